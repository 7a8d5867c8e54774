"""Does a server survive many clients that behave badly, for as long as you like?

    python benchmarks/soak.py --minutes 30

It starts `calm serve` as a process, and sends requests from many clients at once. Most are valid requests
with seeds, whose answers must equal those that the server gave before there was any load. Others hang up
halfway, read or send slowly, or send malformed requests. Every few seconds, the server's memory, open files,
threads and log size are sampled; the samples and a plot go to a folder. The exit status is 1 if an answer was
wrong, if the server did not become idle or exit cleanly, or if something grew faster than allowed. It needs
Linux, for /proc.
"""

import argparse
import collections
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from measure import json_rows

SERVER = ["--port", "0", "--header_seconds", "5", "--body_seconds", "5", "--write_seconds", "5",
          "--max_client_connections", "200", "--max_connections", "250"]  # fmt: skip
PROMPTS = (
    "Once upon a time",
    "One day, a girl",
    "The little dog",
    "Tom and Anna went to the park",
    "It was cold",
)
MIXTURE = {
    "ask": 60, "stream": 15, "pool": 5, "hang_up": 8, "leave_stream": 6, "malformed": 10,
    "invalid": 6, "many": 2, "slow_head": 1, "slow_body": 1, "silent": 1, "slow_reader": 2,
}  # fmt: skip
# Growth that is allowed per hour, and fluctuation on top of it.
ALLOWED = {"memory (MiB)": (64, 32), "descriptors": (20, 60), "threads": (2, 4), "log (KiB)": (512, 64)}
Sample = dict[str, float]  # Resources of the server at one time.
BUSY = (429, 503, 504)  # Statuses without an answer that are not faults.


def main() -> None:
    """Run, write the samples and the plot, and report what went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="stories")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--every", type=float, default=5, help="seconds between samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "server.log"
    with log.open("wb") as errors:
        command = [sys.executable, "-m", "calm", "serve", arguments.model, "--name", "model", *SERVER]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        url = search(process.stdout.readline(), r"(http://[\d.:]+)")
        samples, counts, faults = soak(process, url, log, arguments)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
    if process.returncode not in (0, -signal.SIGTERM):
        faults.append(f"the server ended with {process.returncode}")
    if b"Traceback" in log.read_bytes():
        faults.append(f"there is a traceback in {log}")
    growth = growth_of(samples)
    faults += [f"{name} grew by {grown:.1f}, more than {most:.1f}" for name, (grown, most) in growth.items()
               if grown > most]  # fmt: skip
    report = {"minutes": arguments.minutes, "clients": arguments.clients, "growth": growth, "counts": counts,
              "faults": faults, "notes": samples}  # fmt: skip
    (arguments.out / "soak.json").write_text(json_rows(report) + "\n")
    plot(samples, arguments.out / "soak.svg")
    print(f"{dict(sorted(counts.items()))}")
    for name, (grown, most) in growth.items():
        print(
            f"{name}: {samples[-1][name]:.1f} in the end, grew by {grown:.1f} "
            f"(at most {most:.1f} are allowed)"
        )
    print("\n".join(faults) or f"all is well; see {arguments.out}")
    sys.exit(bool(faults))


def soak(
    process: subprocess.Popen[str], url: str, log: Path, arguments: argparse.Namespace
) -> tuple[list[Sample], dict[str, int], list[str]]:
    """Put the server under load; return samples of its resources, counts of results, and faults."""
    references = references_of(url)
    crowd = Crowd(url, references)
    end_time = time.monotonic() + 60 * arguments.minutes
    threads = [
        threading.Thread(
            target=crowd.work, args=(random.Random(f"{arguments.seed}.{number}"), end_time), daemon=True
        )
        for number in range(arguments.clients)
    ]
    samples = [sample(process.pid, log, 0)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    while time.monotonic() < end_time and process.poll() is None:
        time.sleep(arguments.every)
        samples.append(sample(process.pid, log, time.monotonic() - start))
    for thread in threads:
        thread.join(60)
    faults = [*crowd.faults[:20]]
    if any(thread.is_alive() for thread in threads):
        faults.append("a client still waits for an answer")
    if process.poll() is None and not becomes_idle(url):
        faults.append("the server still writes though nobody asks")
    if process.poll() is None and references_of(url) != references:
        faults.append("in the end the server gives other answers than in the beginning")
    return samples, dict(crowd.counts), faults


def valid_requests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Paths and bodies of valid requests."""
    for number, prompt in enumerate(PROMPTS):
        for temperature, tokens in ((1, 48), (0.7, 16)):
            yield "/v1/completions", {"prompt": prompt, "temperature": temperature, "max_tokens": tokens,
                                      "seed": number, "max_draws": 50}  # fmt: skip
        yield "/v1/calm/pool", {"prompt": prompt, "num_draws": 100, "seed": number}


def references_of(url: str) -> list[Any]:
    """The server's answers to the valid requests, sent one after another."""
    with httpx.Client(base_url=url, timeout=60) as client:
        return [
            answer_of(client.post(path, json={"model": "model", **body})) for path, body in valid_requests()
        ]


def answer_of(response: httpx.Response) -> Any:
    """The text or the pool in a response."""
    body = response.raise_for_status().json()
    return body["candidates"] if "candidates" in body else body["choices"][0]["text"]


def becomes_idle(url: str) -> bool:
    """Whether the server stops generating within 30 seconds."""
    for _ in range(60):
        counts = httpx.get(f"{url}/metrics", timeout=30).text
        if "calm_texts_writing 0.0" in counts and "calm_texts_waiting 0.0" in counts:
            return True
        time.sleep(0.5)
    return False


class Crowd:
    """The clients. Each method named in `MIXTURE` is one behaviour, and returns its result for the counts."""

    def __init__(self, url: str, references: list[Any]) -> None:
        self.url, self.port = url, int(url.rsplit(":", 1)[1])
        self.known = list(zip(valid_requests(), references, strict=True))
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self._lock = threading.Lock()

    def work(self, rng: random.Random, end_time: float) -> None:
        """Behave in random ways until the end time."""
        behaviours, weights = zip(*MIXTURE.items(), strict=True)
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while time.monotonic() < end_time:
                behaviour = rng.choices(behaviours, weights)[0]
                try:
                    result = getattr(self, behaviour)(client, rng)
                except (httpx.TransportError, OSError) as error:
                    # Valid requests fail like this only on connections that have been idle for long.
                    result = f"lost ({type(error).__name__})"
                with self._lock:
                    self.counts[f"{behaviour}: {result}"] += 1

    def fault(self, text: str) -> str:
        """Record a fault."""
        with self._lock:
            self.faults.append(text)
        return "FAULT"

    def pick(self, rng: random.Random, path: str) -> tuple[dict[str, Any], Any]:
        """A random valid request for a path, and its answer."""
        return rng.choice([(body, answer) for (known, body), answer in self.known if known == path])

    def ask(self, client: httpx.Client, rng: random.Random, path: str = "/v1/completions") -> str | int:
        """Send a valid request."""
        body, expected = self.pick(rng, path)
        response = client.post(path, json={"model": "model", **body})
        if response.status_code in BUSY:
            return response.status_code
        if response.status_code != 200 or answer_of(response) != expected:
            return self.fault(
                f"{path} {body}: {response.status_code} {response.text[:500]}, not {str(expected)[:200]}"
            )
        return "right"

    def pool(self, client: httpx.Client, rng: random.Random) -> str | int:
        """Send a valid request for a pool."""
        return self.ask(client, rng, "/v1/calm/pool")

    def stream(self, client: httpx.Client, rng: random.Random, slow: bool = False) -> str | int:
        """Send a valid request whose answer is streamed."""
        body, expected = self.pick(rng, "/v1/completions")
        text = ""
        with client.stream(
            "POST", "/v1/completions", json={"model": "model", "stream": True, **body}
        ) as response:
            if response.status_code in BUSY:
                return response.status_code
            for line in response.iter_lines():
                event = json.loads(line[6:]) if line.startswith("data: {") else {}
                if "error" in event:
                    return "ended by an error" if event["error"]["code"] else self.fault(line)
                text += "".join(choice["text"] for choice in event.get("choices", ()))
                if slow:
                    time.sleep(0.3)
        return "right" if text == expected else self.fault(f"a stream gave {text!r}, not {expected!r}")

    def slow_reader(self, client: httpx.Client, rng: random.Random) -> str | int:
        """Read a stream slowly, or do not read a long one at all."""
        if rng.random() < 0.5:
            return self.stream(client, rng, slow=True)
        body = json.dumps({"model": "model", "prompt": "a", "max_tokens": 400, "n": 8, "stream": True,
                           "temperature": 1, "return_chunks": True})  # fmt: skip
        with self.connect(4096) as connection:
            connection.sendall(post(body))
            time.sleep(8)
        return "done"

    def hang_up(self, client: httpx.Client, rng: random.Random) -> str | int:
        """Hang up in the middle of a request, or before its answer."""
        body, _ = self.pick(rng, "/v1/completions")
        raw = post(json.dumps({"model": "model", **body, "max_tokens": 400, "temperature": 1}))
        with self.connect() as connection:
            connection.sendall(raw[: rng.choice([len(raw), rng.randrange(1, len(raw))])])
            time.sleep(rng.random())
        return "done"

    def leave_stream(self, client: httpx.Client, rng: random.Random) -> str | int:
        """Read a few parts of a stream, then leave."""
        body = {"model": "model", "prompt": "a", "stream": True, "max_tokens": 400, "temperature": 1, "n": 4}
        with client.stream("POST", "/v1/completions", json=body) as response:
            for _ in zip(range(rng.randrange(5)), response.iter_lines(), strict=False):
                pass
        return "done"

    def many(self, client: httpx.Client, rng: random.Random) -> str | int:
        """Ask for more texts than fit in the batch, and soon give up."""
        try:
            client.post("/v1/completions", json={"model": "model", "prompt": "a", "n": 64}, timeout=0.5)
        except httpx.TimeoutException:
            return "gave up"
        return "done"

    def malformed(self, client: httpx.Client, rng: random.Random) -> str | int:
        """Send something that is not HTTP, or a request that must be rejected."""
        raw = rng.choice([
            b"\x16\x03\x01" + rng.randbytes(50) + b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
            rng.randbytes(200) + b"\r\n\r\n",
            b"GET /" + b"a" * 400_000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nhost: evil.example\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2000000\r\n\r\n",
        ])  # fmt: skip
        with self.connect() as connection:
            connection.sendall(raw)
            reply = connection.recv(1 << 16)
        if not reply:
            return "closed"
        status = int(reply.split()[1])
        return status if 400 <= status < 500 else self.fault(f"{raw[:80]!r}: {reply[:200]!r}")

    def invalid(self, client: httpx.Client, rng: random.Random) -> str | int:
        """Send a request with invalid parameters."""
        bodies: list[dict[str, Any]] = [
            {"prompt": "a" * 900_000}, {"prompt": ["a"] * 100_000, "n": 128}, {"prompt": [5] * 300_000},
            {"prompt": 5},
            {"prompt": "a", "max_tokens": 10**9}, {"prompt": "a", "n": 10**9}, {"messages": []},
            {"stop": ["a"] * 99},
        ]  # fmt: skip
        body = rng.choice(bodies)
        status = client.post("/v1/completions", json={"model": "model", **body}).status_code
        return status if status in (400, 413, *BUSY) else self.fault(f"{str(body)[:80]}: {status}")

    def slow_head(self, client: httpx.Client, rng: random.Random) -> str | int:
        """Send header after header, as long as the server allows it."""
        return self.trickle(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n", b"x: y\r\n")

    def slow_body(self, client: httpx.Client, rng: random.Random) -> str | int:
        """Send a body byte by byte."""
        return self.trickle(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n", b" "
        )

    def silent(self, client: httpx.Client, rng: random.Random) -> str | int:
        """Connect and send nothing."""
        return self.trickle(b"", b"")

    def trickle(self, opening: bytes, part: bytes) -> str | int:
        """Send small parts until the server hangs up."""
        with self.connect() as connection:
            connection.settimeout(0.5)
            connection.sendall(opening)
            for _ in range(60):
                try:
                    connection.sendall(part)
                    reply = connection.recv(1 << 16)
                except TimeoutError:
                    continue
                return int(reply.split()[1]) if reply else "closed"
        return self.fault("a slow connection stayed open for 30 seconds")

    def connect(self, buffer: int | None = None) -> socket.socket:
        """Connect to the server, optionally with a small receive buffer."""
        connection = socket.socket()
        connection.settimeout(60)
        if buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.connect(("127.0.0.1", self.port))
        return connection


def post(body: str) -> bytes:
    """A raw HTTP request for a text."""
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    return (head + body).encode()


def search(text: str, pattern: str) -> str:
    """The first group of a pattern, where it first matches."""
    match = re.search(pattern, text)
    assert match is not None, text
    return match[1]


def sample(pid: int, log: Path, seconds: float) -> Sample:
    """The current resources of the server."""
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        "seconds": round(seconds, 1),
        "memory (MiB)": int(search(status, r"VmRSS:\s+(\d+)")) / 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208 (they come and go)
        "threads": int(search(status, r"Threads:\s+(\d+)")),
        "log (KiB)": log.stat().st_size / 1024,
    }


def growth_of(samples: list[Sample]) -> dict[str, tuple[float, float]]:
    """Growth of each resource, by a linear fit to all but the first quarter; and how much is allowed."""
    late = [row for row in samples if row["seconds"] >= samples[-1]["seconds"] / 4]
    times = [row["seconds"] for row in late]
    mean, duration = sum(times) / len(times), times[-1] - times[0]
    spread = sum((t - mean) ** 2 for t in times) or 1
    growth = {}
    for name, (per_hour, fluctuation) in ALLOWED.items():
        slope = sum((row["seconds"] - mean) * row[name] for row in late) / spread
        growth[name] = slope * duration, per_hour * duration / 3600 + fluctuation
    return growth


def plot(samples: list[Sample], path: Path) -> None:
    """Plot each resource over time."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (only needed here)

    figure = Figure(figsize=(8, 8), layout="constrained")
    for axes, name in zip(figure.subplots(len(ALLOWED), sharex=True), ALLOWED, strict=True):
        axes.plot([row["seconds"] / 60 for row in samples], [row[name] for row in samples])
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("minutes")
    figure.savefig(path)


if __name__ == "__main__":
    main()
