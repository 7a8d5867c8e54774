"""How much faster does a Transformer write with speculative decoding? Tokens per second, and per pass.

    python benchmarks/drafting.py MODEL --draft CALM --small SMALL --prompts valid.jsonl.xz

MODEL is any causal language model; CALM has the same tokens (`calm train --recipe draft`), and so has SMALL,
another causal model, for transformers' assisted generation. A prompt is a passage of the documents, which
none of the models should have been trained on. Each prompt is continued in all ways in turns, in one process,
one text at a time; end-of-text tokens are ignored. Ways:

    plain       `generate` of transformers
    lookup      the same with drafts from the prompt (prompt_lookup_num_tokens)
    assisted N  the same with drafts of N tokens by SMALL (assistant_model)
    calm N      drafts of N chunks by CALM: one continuation, or a tree of the given number of tokens; with
                "lookup", drafts are copied from the text if its last tokens occurred before

Ratios are tokens per second relative to `plain`: means over prompts, with standard errors.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from measure import error_of_mean, json_rows, machine
from source_text import passages
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from calm.data.formats import read_documents
from calm.data.options import ReadingOptions
from calm.models.drafting.generate import Drafting
from calm.models.loading import load_model

LOOKUP_TOKENS = 10  # Of a draft from the prompt.


class Passes:
    """Counts the forward passes of a model."""

    def __init__(self, model: Any) -> None:
        self.number = 0
        model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.number += 1


def generators_of(model: Any, arguments: argparse.Namespace) -> dict[str, Callable[..., Tensor]]:
    """Name of a way -> a function that continues a prompt."""

    def generate(**extra: Any) -> Callable[..., Tensor]:
        return lambda prompt_1T, **settings: model.generate(prompt_1T, **settings, **extra)

    generators = {"plain": generate(), "lookup": generate(prompt_lookup_num_tokens=LOOKUP_TOKENS)}
    if arguments.draft:
        draft = load_model(str(arguments.draft)).eval()  # In its own precision, as in commands.
        for number, tree in product(arguments.chunks, arguments.tree_tokens):
            name = f"calm {number}, tree of {tree}" if tree else f"calm {number}"
            alone, copied = (Drafting(draft, number, lookup=length, tree_tokens=tree) for length in (0, 3))
            generators |= {name: generate(custom_generate=alone)}
            generators |= {f"{name}, lookup": generate(custom_generate=copied)}
    if arguments.small:
        small: Any = AutoModelForCausalLM.from_pretrained(arguments.small, dtype=model.dtype).eval()
        small.generation_config.num_assistant_tokens_schedule = "constant"
        small.generation_config.assistant_confidence_threshold = 0.0
        for number in arguments.assisted:

            def assisted(prompt_1T: Tensor, number: int = number, **settings: Any) -> Tensor:
                small.generation_config.num_assistant_tokens = number
                return model.generate(prompt_1T, assistant_model=small, **settings)

            generators[f"assisted {number}"] = assisted
    return generators


def measure(
    model: Any, prompts_RT: Tensor, temperature: float, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per way."""
    passes, generators = Passes(model), generators_of(model, arguments)
    settings = {"max_new_tokens": arguments.tokens, "do_sample": temperature > 0}
    settings |= {"temperature": temperature, "top_k": 0} if temperature > 0 else {}
    seconds: dict[str, list[float]] = {name: [] for name in generators}
    tokens_per_pass: dict[str, list[float]] = {name: [] for name in generators}
    for number, prompt_T in enumerate([prompts_RT[0], *prompts_RT]):  # The first prompt is also the warm-up.
        for name, generate in generators.items():
            torch.manual_seed(number)
            passes.number, start = 0, time.perf_counter()
            text_1T = generate(
                prompt_T.unsqueeze(0), attention_mask=torch.ones_like(prompt_T).unsqueeze(0), **settings
            )
            if number:
                num_tokens = text_1T.shape[1] - len(prompt_T)
                seconds[name].append((time.perf_counter() - start) / num_tokens)
                tokens_per_pass[name].append(num_tokens / passes.number)
    rows = []
    for name in generators:
        ratios = [plain / drafted for plain, drafted in zip(seconds["plain"], seconds[name], strict=True)]
        error = error_of_mean(ratios)
        rows.append(
            {
                "temperature": temperature,
                "way": name,
                "tokens_per_second": round(1 / statistics.median(seconds[name]), 2),
                "tokens_a_pass": round(statistics.mean(tokens_per_pass[name]), 3),
                "times_plain": round(statistics.mean(ratios), 3),
                "error": round(error, 3),
            }
        )
        row = rows[-1]
        speeds = f"{row['tokens_per_second']:.1f} | {row['tokens_a_pass']:.2f} | {row['times_plain']:.2f}"
        print(f"| {temperature:g} | {name} | {speeds} ± {error:.2f} |", flush=True)
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--draft", type=Path, help="model folder of a CALM")
    parser.add_argument("--small", type=Path, help="folder of a small causal language model")
    parser.add_argument("--prompts", type=Path, required=True, help="documents, as calm prepare reads them")
    parser.add_argument("--number", type=int, default=20, help="prompts")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1])
    parser.add_argument("--tree_tokens", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--assisted", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="where rows are kept, a JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    model.generation_config.eos_token_id = None
    texts = [text for text in islice(read_documents(arguments.prompts, ReadingOptions()), 1000) if text]
    ids_T = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    generator = torch.Generator().manual_seed(1)
    prompts_RT = passages(ids_T, arguments.prompt_tokens, generator, arguments.number)
    print(f"{machine()}; {arguments.dtype}, {arguments.tokens} tokens after {arguments.prompt_tokens}\n")
    print("| T | way | tokens/s | tokens a pass | times plain |\n|---|---|---|---|---|")
    rows = []
    for temperature in arguments.temperatures:
        rows += measure(model, prompts_RT, temperature, arguments)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
        settings["model"] = Path(arguments.model).name
        arguments.output.write_text(json_rows({"machine": machine(), **settings, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
