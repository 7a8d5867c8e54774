"""How much sooner a Transformer writes with a draft: tokens per second, and how much of a draft it keeps.

    python benchmarks/drafting.py MODEL --draft CALM --small SMALL --prompts valid.jsonl.xz

MODEL is any causal language model, CALM one that has its tokens (`calm train --recipe draft`), SMALL another
causal model of these tokens for transformers' assisted generation. A prompt is a passage of the documents,
which nobody should have trained on. Each prompt is continued in every way in turns, in one process, one text
at a time; texts go on after an end. Ways:

    plain       generate of transformers
    lookup      its drafts from the prompt (prompt_lookup_num_tokens)
    assisted    its drafts by SMALL (assistant_model), of the lengths that are given
    calm N      drafts of N chunks by CALM that go on in one way, or in trees of so many tokens as are given,
                alone or copied from the text where its last tokens stood before

Ratios are of tokens per second to plain, each prompt by itself, the mean with its standard error.
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

LOOKED_UP = 10  # Tokens of a draft from the prompt.


class Passes:
    """Counts the passes of a model."""

    def __init__(self, model: Any) -> None:
        self.number = 0
        model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.number += 1


def ways(model: Any, arguments: argparse.Namespace) -> dict[str, Callable[..., Tensor]]:
    """How a prompt is continued."""

    def generate(**more: Any) -> Callable[..., Tensor]:
        return lambda prompt_1T, **how: model.generate(prompt_1T, **how, **more)

    found = {"plain": generate(), "lookup": generate(prompt_lookup_num_tokens=LOOKED_UP)}
    if arguments.draft:
        draft = load_model(str(arguments.draft)).eval()  # In its own precision, as commands have it.
        for number, tree in product(arguments.chunks, arguments.tree_tokens):
            name = f"calm {number}, tree of {tree}" if tree else f"calm {number}"
            alone, copied = (Drafting(draft, number, lookup=most, tree_tokens=tree) for most in (0, 3))
            found |= {name: generate(custom_generate=alone)}
            found |= {f"{name}, lookup": generate(custom_generate=copied)}
    if arguments.small:
        small: Any = AutoModelForCausalLM.from_pretrained(arguments.small, dtype=model.dtype).eval()
        small.generation_config.num_assistant_tokens_schedule = "constant"
        small.generation_config.assistant_confidence_threshold = 0.0
        for number in arguments.assisted:

            def assisted(prompt_1T: Tensor, number: int = number, **how: Any) -> Tensor:
                small.generation_config.num_assistant_tokens = number
                return model.generate(prompt_1T, assistant_model=small, **how)

            found[f"assisted {number}"] = assisted
    return found


def measure(
    model: Any, prompts_RT: Tensor, temperature: float, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each way."""
    passes, all_ways = Passes(model), ways(model, arguments)
    how = {"max_new_tokens": arguments.tokens, "do_sample": temperature > 0}
    how |= {"temperature": temperature, "top_k": 0} if temperature > 0 else {}
    seconds: dict[str, list[float]] = {name: [] for name in all_ways}
    tokens_a_pass: dict[str, list[float]] = {name: [] for name in all_ways}
    for number, prompt_T in enumerate([prompts_RT[0], *prompts_RT]):  # The first once to warm up.
        for name, write in all_ways.items():
            torch.manual_seed(number)
            passes.number, begun = 0, time.perf_counter()
            written = write(
                prompt_T.unsqueeze(0), attention_mask=torch.ones_like(prompt_T).unsqueeze(0), **how
            )
            if number:
                seconds[name].append((time.perf_counter() - begun) / (written.shape[1] - len(prompt_T)))
                tokens_a_pass[name].append((written.shape[1] - len(prompt_T)) / passes.number)
    rows = []
    for name in all_ways:
        ratios = [plain / own for plain, own in zip(seconds["plain"], seconds[name], strict=True)]
        error = error_of_mean(ratios)
        rows.append(
            {
                "temperature": temperature,
                "way": name,
                "tokens_per_second": round(1 / statistics.median(seconds[name]), 2),
                "tokens_a_pass": round(statistics.mean(tokens_a_pass[name]), 3),
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
    rows = [row for one in arguments.temperatures for row in measure(model, prompts_RT, one, arguments)]
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        told = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
        told["model"] = Path(arguments.model).name
        arguments.output.write_text(json_rows({"machine": machine(), **told, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
