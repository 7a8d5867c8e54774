"""What do concurrent requests gain by sharing batches, and does each get the right text?

    calm demo
    python benchmarks/serving.py runs/demo/model --clients 50

The server runs in this process, and clients of the OpenAI API in another, over loopback. Each client sends
several requests, each with its own prompt and seed; all clients send at once. This is repeated for several
batch sizes, in turns with `generate` on the same prompts in batches of that size. Texts are compared with
those of `generate` for each prompt alone. `calm compile MODEL` beforehand makes both faster.
"""

import argparse
import asyncio
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import aiohttp
import torch
import uvicorn
from measure import machine, status
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from calm.data.stories import stories
from calm.models.calm import CalmForCausalLM
from calm.models.loading import load_model_and_tokenizer
from calm.serving.app import create_app
from calm.serving.connections import uvicorn_config
from calm.serving.settings import ServerSettings
from calm.texts import continue_texts


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    arguments = parser.parse_args()
    model, tokenizer = load_model_and_tokenizer(arguments.model)
    prompts = [
        " ".join(story.split()[: 10 + number % 20])
        for number, story in enumerate(stories(9, arguments.clients * arguments.requests))
    ]
    expected = [
        continue_texts(
            model,
            tokenizer,
            [prompt],
            seed=number,
            max_new_tokens=arguments.tokens,
            temperature=arguments.temperature,
        )[0]
        for number, prompt in enumerate(prompts)
    ]
    speeds: dict[int, list[float]] = {rows: [] for rows in arguments.rows}
    ratios: dict[int, list[float]] = {rows: [] for rows in arguments.rows}
    load = f"{arguments.clients} clients, {arguments.requests} requests of {arguments.tokens} tokens each"
    print(f"{machine()}; {load}, T = {arguments.temperature:g}")
    print(
        "| round | rows | tokens/s | `generate` | texts as alone | MiB in memory |\n|---|---|---|---|---|---|"
    )
    for number in range(1, arguments.rounds + 1):
        for rows in arguments.rows:
            speed, texts = request_all(model, tokenizer, prompts, rows, arguments)
            direct = generate_all(model, tokenizer, prompts, rows, arguments)
            speeds[rows].append(speed)
            ratios[rows].append(speed / direct)
            same = sum(a == b for a, b in zip(texts, expected, strict=True))
            memory = status("VmRSS") / 2**20
            row = (
                f"| {number} | {rows} | {speed:.0f} | {direct:.0f} | {same} of {len(texts)} | {memory:.0f} |"
            )
            print(row, flush=True)
    print("| rows | tokens/s: median (least to most) | to the first | to `generate` |\n|---|---|---|---|")
    base = statistics.median(speeds[arguments.rows[0]])
    for rows, values in speeds.items():
        to_first = f"{statistics.median(values) / base:.2f}"
        print(f"| {rows} | {_spread(values, 0)} | {to_first} | {_spread(ratios[rows], 2)} |")


def request_all(
    model: CalmForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    rows: int,
    arguments: argparse.Namespace,
) -> tuple[float, list[str]]:
    """Tokens per second of all clients together, and their texts."""
    settings = ServerSettings(name="model", max_rows=rows, temperature=arguments.temperature)
    app = create_app(model, tokenizer, settings)
    server = uvicorn.Server(uvicorn_config(app, settings, port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/completions"
    # In another process, so that clients do not compete with the server for the interpreter lock.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(send_requests, url, prompts[:1], arguments.tokens, arguments.clients).result()
        seconds, answers = process.submit(
            send_requests, url, prompts, arguments.tokens, arguments.clients
        ).result()
    server.should_exit = True
    thread.join()
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return tokens / seconds, [answer["choices"][0]["text"] for answer in answers]


def send_requests(
    url: str, prompts: list[str], tokens: int, clients: int
) -> tuple[float, list[dict[str, Any]]]:
    """Send all prompts from `clients` concurrent clients; return the seconds taken, and the answers."""
    answers: list[dict[str, Any]] = [{} for _ in prompts]
    remaining = iter(enumerate(prompts))

    async def run_client(session: aiohttp.ClientSession) -> None:
        for index, prompt in remaining:
            body = {"model": "model", "prompt": prompt, "seed": index, "max_tokens": tokens}
            async with session.post(url, json=body) as answer:
                answers[index] = await answer.json()

    async def run_all_clients() -> float:
        connector = aiohttp.TCPConnector(limit=clients)
        async with aiohttp.ClientSession(connector=connector) as session:
            start = time.perf_counter()
            await asyncio.gather(*(run_client(session) for _ in range(clients)))
            return time.perf_counter() - start

    return asyncio.run(run_all_clients()), answers


def generate_all(
    model: CalmForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    rows: int,
    arguments: argparse.Namespace,
) -> float:
    """Tokens per second of `generate`, in batches of `rows` prompts."""
    encoded = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    tokens, start = 0, time.perf_counter()
    for first in range(0, len(prompts), rows):
        batch = encoded[first : first + rows]
        ids = pad_sequence(batch, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in batch], batch_first=True, padding_side="left")
        settings = {"max_new_tokens": arguments.tokens, "temperature": arguments.temperature, "seed": first}
        new = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
        is_eos = torch.isin(new, torch.tensor(model.config.eos_token_id))
        tokens += int((is_eos.cumsum(-1) - is_eos.long() == 0).sum())
    return tokens / (time.perf_counter() - start)


def _spread(values: list[float], digits: int) -> str:
    """Median, minimum and maximum."""
    least, median, most = min(values), statistics.median(values), max(values)
    return f"{median:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


if __name__ == "__main__":
    main()
