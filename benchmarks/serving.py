"""What do concurrent requests gain by sharing batches, and does each get its own text?

    calm demo
    python benchmarks/serving.py runs/demo/model --clients 50

A server in this process and clients of the OpenAI API on loopback. Each client asks once, with a prompt and a
seed of its own; all at the same time, with several sizes of the batch, in turns. Texts are compared with what
`generate` writes for each prompt alone.
"""

import argparse
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import uvicorn
from measure import machine, status
from transformers import PreTrainedTokenizerBase

from calm.data.stories import stories
from calm.models.calm import CalmForCausalLM
from calm.models.loading import load_model_and_tokenizer
from calm.serving.app import create_app
from calm.serving.settings import ServerSettings
from calm.texts import continue_texts


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    arguments = parser.parse_args()
    model, tokenizer = load_model_and_tokenizer(arguments.model)
    prompts = [
        " ".join(story.split()[: 10 + number % 20])
        for number, story in enumerate(stories(9, arguments.clients))
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
    asked = f"{arguments.clients} clients, {arguments.tokens} tokens each, T = {arguments.temperature:g}"
    print(f"{machine()}; {asked}")
    print("| round | rows | tokens/s | texts as alone | MiB in memory |\n|---|---|---|---|---|")
    for number in range(1, arguments.rounds + 1):
        for rows in arguments.rows:
            speed, texts = ask_all(model, tokenizer, prompts, rows, arguments)
            speeds[rows].append(speed)
            same = sum(a == b for a, b in zip(texts, expected, strict=True))
            memory = status("VmRSS") / 2**20
            print(f"| {number} | {rows} | {speed:.0f} | {same} of {len(texts)} | {memory:.0f} |", flush=True)
    print("| rows | tokens/s: median (least to most) | ratio |\n|---|---|---|")
    base = statistics.median(speeds[arguments.rows[0]])
    for rows, all_speeds in speeds.items():
        median = statistics.median(all_speeds)
        spread = f"{min(all_speeds):.0f} to {max(all_speeds):.0f}"
        print(f"| {rows} | {median:.0f} ({spread}) | {median / base:.2f} |")


def ask_all(
    model: CalmForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    rows: int,
    arguments: argparse.Namespace,
) -> tuple[float, list[str]]:
    """Tokens per second of all clients together, and their texts."""
    settings = ServerSettings(name="model", max_rows=rows, temperature=arguments.temperature)
    app = create_app(model, tokenizer, settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)

    def ask(number: int) -> openai.types.Completion:
        return client.completions.create(
            model="model", prompt=prompts[number], seed=number, max_tokens=arguments.tokens
        )

    ask(0)
    begin = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, range(len(prompts))))
    seconds = time.perf_counter() - begin
    server.should_exit = True
    thread.join()
    tokens = sum(answer.usage.completion_tokens for answer in answers if answer.usage)
    return tokens / seconds, [answer.choices[0].text for answer in answers]


if __name__ == "__main__":
    main()
