"""Does a server stay well under clients that behave badly, for as long as one likes?

    python benchmarks/soak.py --minutes 30

Starts `calm serve` as a process and asks it with many clients at once. Most requests are good ones with
seeds, whose answers must be those that the server gave before the crowd came. Others hang up in the middle,
read or send slowly, or send what is no request. Every few seconds the memory, descriptors, threads and log
of the server are noted; the notes and a plot go to a folder. The exit status is 1 if an answer was wrong,
the server did not come to rest or end cleanly, or something grew faster than is allowed. Needs Linux, whose
/proc tells what a process has.
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
# In an hour, and what may come and go beside.
ALLOWED = {"memory (MiB)": (64, 32), "descriptors": (20, 60), "threads": (2, 4), "log (KiB)": (512, 64)}
Note = dict[str, float]  # What the server had at a time.
BUSY = (429, 503, 504)  # No answer, and no fault either.


def main() -> None:
    """Run, write the notes and the plot, and tell what was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="stories")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--every", type=float, default=5, help="seconds between notes")
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
        url = found_in(process.stdout.readline(), r"(http://[\d.:]+)")
        notes, counts, faults = soak(process, url, log, arguments)
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
    growth = growth_of(notes)
    faults += [f"{name} grew by {grown:.1f}, more than {most:.1f}" for name, (grown, most) in growth.items()
               if grown > most]  # fmt: skip
    report = {"minutes": arguments.minutes, "clients": arguments.clients, "growth": growth, "counts": counts,
              "faults": faults, "notes": notes}  # fmt: skip
    (arguments.out / "soak.json").write_text(json_rows(report) + "\n")
    plot(notes, arguments.out / "soak.svg")
    print(f"{dict(sorted(counts.items()))}")
    for name, (grown, most) in growth.items():
        print(
            f"{name}: {notes[-1][name]:.1f} in the end, grew by {grown:.1f} (at most {most:.1f} are allowed)"
        )
    print("\n".join(faults) or f"all is well; see {arguments.out}")
    sys.exit(bool(faults))


def soak(
    process: subprocess.Popen[str], url: str, log: Path, arguments: argparse.Namespace
) -> tuple[list[Note], dict[str, int], list[str]]:
    """Notes of what the server had, counts of what was done, and faults."""
    references = references_of(url)
    crowd = Crowd(url, references)
    ends = time.monotonic() + 60 * arguments.minutes
    threads = [
        threading.Thread(
            target=crowd.work, args=(random.Random(f"{arguments.seed}.{number}"), ends), daemon=True
        )
        for number in range(arguments.clients)
    ]
    notes = [note(process.pid, log, 0)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    while time.monotonic() < ends and process.poll() is None:
        time.sleep(arguments.every)
        notes.append(note(process.pid, log, time.monotonic() - began))
    for thread in threads:
        thread.join(60)
    faults = [*crowd.faults[:20]]
    if any(thread.is_alive() for thread in threads):
        faults.append("a client still waits for an answer")
    if process.poll() is None and not comes_to_rest(url):
        faults.append("the server still writes though nobody asks")
    if process.poll() is None and references_of(url) != references:
        faults.append("in the end the server gives other answers than in the beginning")
    return notes, dict(crowd.counts), faults


def questions() -> Iterator[tuple[str, dict[str, Any]]]:
    """Good requests: paths and bodies."""
    for number, prompt in enumerate(PROMPTS):
        for temperature, tokens in ((1, 48), (0.7, 16)):
            yield "/v1/completions", {"prompt": prompt, "temperature": temperature, "max_tokens": tokens,
                                      "seed": number, "max_draws": 50}  # fmt: skip
        yield "/v1/calm/pool", {"prompt": prompt, "num_draws": 100, "seed": number}


def references_of(url: str) -> list[Any]:
    """What the server answers one by one."""
    with httpx.Client(base_url=url, timeout=60) as client:
        return [answer_of(client.post(path, json={"model": "model", **body})) for path, body in questions()]


def answer_of(response: httpx.Response) -> Any:
    """The text, or the pool."""
    body = response.raise_for_status().json()
    return body["candidates"] if "candidates" in body else body["choices"][0]["text"]


def comes_to_rest(url: str) -> bool:
    """Whether soon nothing is written any more."""
    for _ in range(60):
        counts = httpx.get(f"{url}/metrics", timeout=30).text
        if "calm_texts_writing 0.0" in counts and "calm_texts_waiting 0.0" in counts:
            return True
        time.sleep(0.5)
    return False


class Crowd:
    """What clients do; each method is one way to behave."""

    def __init__(self, url: str, references: list[Any]) -> None:
        self.url, self.port = url, int(url.rsplit(":", 1)[1])
        self.known = list(zip(questions(), references, strict=True))
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self._lock = threading.Lock()

    def work(self, rng: random.Random, ends: float) -> None:
        """Behave this way and that until it is time."""
        ways, weights = zip(*MIXTURE.items(), strict=True)
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while time.monotonic() < ends:
                way = rng.choices(ways, weights)[0]
                try:
                    result = getattr(self, way)(client, rng)
                except (httpx.TransportError, OSError) as error:
                    # Those who behave may lose a connection that has been idle for long, and no more.
                    result = f"lost ({type(error).__name__})"
                with self._lock:
                    self.counts[f"{way}: {result}"] += 1

    def fault(self, text: str) -> str:
        """Note what must not be."""
        with self._lock:
            self.faults.append(text)
        return "FAULT"

    def pick(self, rng: random.Random, path: str) -> tuple[dict[str, Any], Any]:
        """A good request of a kind, and its answer."""
        return rng.choice([(body, answer) for (place, body), answer in self.known if place == path])

    def ask(self, client: httpx.Client, rng: random.Random, path: str = "/v1/completions") -> str | int:
        """A good request."""
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
        """A good one of the other kind."""
        return self.ask(client, rng, "/v1/calm/pool")

    def stream(self, client: httpx.Client, rng: random.Random, slow: bool = False) -> str | int:
        """A good request whose answer comes in parts."""
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
        """A stream that is read slowly, or a long one that is not read at all."""
        if rng.random() < 0.5:
            return self.stream(client, rng, slow=True)
        body = json.dumps({"model": "model", "prompt": "a", "max_tokens": 400, "n": 8, "stream": True,
                           "temperature": 1, "return_chunks": True})  # fmt: skip
        with self.connect(4096) as connection:
            connection.sendall(post(body))
            time.sleep(8)
        return "done"

    def hang_up(self, client: httpx.Client, rng: random.Random) -> str | int:
        """Leave in the middle of a request, or before its answer."""
        body, _ = self.pick(rng, "/v1/completions")
        raw = post(json.dumps({"model": "model", **body, "max_tokens": 400, "temperature": 1}))
        with self.connect() as connection:
            connection.sendall(raw[: rng.choice([len(raw), rng.randrange(1, len(raw))])])
            time.sleep(rng.random())
        return "done"

    def leave_stream(self, client: httpx.Client, rng: random.Random) -> str | int:
        """Read a few parts."""
        asked = {"model": "model", "prompt": "a", "stream": True, "max_tokens": 400, "temperature": 1, "n": 4}
        with client.stream("POST", "/v1/completions", json=asked) as response:
            for _ in zip(range(rng.randrange(5)), response.iter_lines(), strict=False):
                pass
        return "done"

    def many(self, client: httpx.Client, rng: random.Random) -> str | int:
        """More texts than there are places, given up soon."""
        try:
            client.post("/v1/completions", json={"model": "model", "prompt": "a", "n": 64}, timeout=0.5)
        except httpx.TimeoutException:
            return "gave up"
        return "done"

    def malformed(self, client: httpx.Client, rng: random.Random) -> str | int:
        """What is no HTTP, or none that is taken."""
        raw = rng.choice([
            b"\x16\x03\x01" + rng.randbytes(50) + b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
            rng.randbytes(200) + b"\r\n\r\n",
            b"GET /" + b"a" * 400_000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nhost: evil.example\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2000000\r\n\r\n",
        ])  # fmt: skip
        with self.connect() as connection:
            connection.sendall(raw)
            said = connection.recv(1 << 16)
        if not said:
            return "closed"
        status = int(said.split()[1])
        return status if 400 <= status < 500 else self.fault(f"{raw[:80]!r}: {said[:200]!r}")

    def invalid(self, client: httpx.Client, rng: random.Random) -> str | int:
        """Requests that cannot be honoured."""
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
        """Header after header, as long as the server lets one."""
        return self.trickle(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n", b"x: y\r\n")

    def slow_body(self, client: httpx.Client, rng: random.Random) -> str | int:
        """A body byte after byte."""
        return self.trickle(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n", b" "
        )

    def silent(self, client: httpx.Client, rng: random.Random) -> str | int:
        """Nothing at all."""
        return self.trickle(b"", b"")

    def trickle(self, begin: bytes, part: bytes) -> str | int:
        """Send parts until the server hangs up."""
        with self.connect() as connection:
            connection.settimeout(0.5)
            connection.sendall(begin)
            for _ in range(60):
                try:
                    connection.sendall(part)
                    said = connection.recv(1 << 16)
                except TimeoutError:
                    continue
                return int(said.split()[1]) if said else "closed"
        return self.fault("a slow connection stayed open for 30 seconds")

    def connect(self, buffer: int | None = None) -> socket.socket:
        """A socket."""
        connection = socket.socket()
        connection.settimeout(60)
        if buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.connect(("127.0.0.1", self.port))
        return connection


def post(body: str) -> bytes:
    """A request in bytes."""
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    return (head + body).encode()


def found_in(text: str, pattern: str) -> str:
    """The group of a pattern where it first matches."""
    found = re.search(pattern, text)
    assert found is not None, text
    return found[1]


def note(pid: int, log: Path, seconds: float) -> Note:
    """What the server has now."""
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        "seconds": round(seconds, 1),
        "memory (MiB)": int(found_in(status, r"VmRSS:\s+(\d+)")) / 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208 (they come and go)
        "threads": int(found_in(status, r"Threads:\s+(\d+)")),
        "log (KiB)": log.stat().st_size / 1024,
    }


def growth_of(notes: list[Note]) -> dict[str, tuple[float, float]]:
    """How much each grew by the line that fits best after the first quarter, and how much is allowed."""
    late = [one for one in notes if one["seconds"] >= notes[-1]["seconds"] / 4]
    times = [one["seconds"] for one in late]
    middle, length = sum(times) / len(times), times[-1] - times[0]
    spread = sum((t - middle) ** 2 for t in times) or 1
    growth = {}
    for name, (in_an_hour, beside) in ALLOWED.items():
        slope = sum((one["seconds"] - middle) * one[name] for one in late) / spread
        growth[name] = slope * length, in_an_hour * length / 3600 + beside
    return growth


def plot(notes: list[Note], path: Path) -> None:
    """Each over time."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (the figures are not the point)

    figure = Figure(figsize=(8, 8), layout="constrained")
    for axes, name in zip(figure.subplots(len(ALLOWED), sharex=True), ALLOWED, strict=True):
        axes.plot([one["seconds"] / 60 for one in notes], [one[name] for one in notes])
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("minutes")
    figure.savefig(path)


if __name__ == "__main__":
    main()
