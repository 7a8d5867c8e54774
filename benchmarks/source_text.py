"""Have a model write text, on which a CALM is trained to draft for it.

    python benchmarks/source_text.py SOURCE --prompts classics.jsonl --output written.jsonl

A prompt is a passage of the given documents. Batches take turns at the given temperatures. Texts are appended
to the output, one per line, so an interrupted command resumes.
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from calm.core.speculative import draw_distinct
from calm.data.formats import read_documents
from calm.data.options import ReadingOptions
from calm.models.caches import CACHE


def passages(ids_T: list[int], length: int, generator: torch.Generator, number: int) -> torch.Tensor:
    """Random passages of `length` tokens, (number, length)."""
    starts = torch.randint(len(ids_T) - length, (number,), generator=generator).tolist()
    return torch.tensor([ids_T[start : start + length] for start in starts])


@torch.no_grad()
def continue_passages(
    model: Any, prompts_RT: torch.Tensor, number: int, temperature: float, generator: torch.Generator
) -> torch.Tensor:
    """Passages with `number` more tokens each, end-of-text tokens included.

    `generate` draws with `torch.multinomial`, which takes half of the time of a step here: it draws a random
    number for each token of the vocabulary.
    """
    text_RT, next_RT, cache = prompts_RT, prompts_RT, DynamicCache(config=model.config)
    for _ in range(number):
        logits_RV = model(next_RT, logits_to_keep=1, **{CACHE: cache}).logits[:, -1].float()
        if temperature == 0:
            next_RT = logits_RV.argmax(-1, keepdim=True)
        else:
            next_RT = draw_distinct((logits_RV / temperature).softmax(-1), 1, generator)
        text_RT = torch.cat([text_RT, next_RT], dim=1)
    return text_RT


def main() -> None:
    """Write until there are enough tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder of a causal language model")
    parser.add_argument("--prompts", type=Path, required=True, help="documents, as calm prepare reads them")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="new tokens of all texts")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=160)
    parser.add_argument("--temperatures", type=float, nargs="*", default=[1.0, 0.5, 0.0])
    parser.add_argument("--documents", type=int, default=400, help="documents that passages come from")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", help="implementation of transformers; on a CPU, eager can be faster")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.source)
    model: Any = AutoModelForCausalLM.from_pretrained(
        arguments.source, dtype=arguments.dtype, attn_implementation=arguments.attention
    ).eval()
    documents = read_documents(arguments.prompts, ReadingOptions())
    texts = [text for text in islice(documents, arguments.documents) if text]
    ids_T = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    per_batch = arguments.rows * arguments.new_tokens
    done = arguments.output.read_text().count("\n") // arguments.rows if arguments.output.exists() else 0
    for batch in range(done, -(-arguments.tokens // per_batch)):
        start = time.monotonic()
        generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + batch)
        prompts_RT = passages(ids_T, arguments.prompt_tokens, generator, arguments.rows)
        temperature = arguments.temperatures[batch % len(arguments.temperatures)]
        written_RT = continue_passages(model, prompts_RT, arguments.new_tokens, temperature, generator)
        lines = [
            json.dumps({"text": tokenizer.decode(row), "temperature": temperature})
            for row in written_RT.tolist()
        ]
        with arguments.output.open("a") as file:
            file.write("\n".join(lines) + "\n")
        rate = per_batch / (time.monotonic() - start)
        print(f"batch {batch}, temperature {temperature}: {rate:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
