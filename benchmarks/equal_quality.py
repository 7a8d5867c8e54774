"""Tokens per second at equal quality: a CALM and a Transformer with the same BrierLM, in several engines.

    python benchmarks/prose.py --train train.jsonl.xz --valid valid.jsonl.xz --output runs/prose --seeds 1 \\
        --models sequential_K4 --budgets 5e12                         # and: --models baseline --budgets 1e13
    python benchmarks/equal_quality.py runs/prose/sequential_K4_5e+12_seed1/model \\
        runs/prose/baseline_1e+13_seed1/model

All continue prompts of 32 tokens at T = 1, in turns in one process; end-of-text tokens are ignored. The CALM
runs `generate`, plain and compiled (`calm compile`); the Transformer runs `generate` of transformers and the
engines of `benchmarks/engines.py` (which says what to install; missing ones are skipped and named). Before it
is timed, each engine must produce the same tokens as `generate` at T = 0, and the compiled CALM, up to
rounding, those of the plain one with the same seed. Times exclude compiling, exporting and loading. The time
to the first token is that of a text of one token, or of one chunk.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engines import GREEDY, MOST_ROWS, Compiled, Engine, Generate, OnnxGenai, OnnxRuntime, OpenVino
from measure import in_turns, machine, ratios
from torch import Tensor

from calm.models.generation.ahead import compile_steps
from calm.models.loading import load_language_model_and_tokenizer

PROMPT, CHECKED = 32, 32  # Tokens of a prompt, and of the texts that are compared.
MAX_SHARE_DIFFERING = 0.1  # Of texts; in one draw of a few thousand, rounding decides between two tokens.
REFERENCE, GENAI = "Transformer, generate", "Transformer, onnxruntime-genai"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("calm", type=Path, help="model folder of a CALM")
    parser.add_argument("llama", type=Path, help="model folder of a Transformer of the same tokens")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without", nargs="*", default=[], metavar="PACKAGE", help="engines to leave out")
    parser.add_argument("--made", type=Path, default=Path("build/engines"), help="where engines are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    calm: Any = load_language_model_and_tokenizer(str(arguments.calm))[0]
    llama: Any = load_language_model_and_tokenizer(str(arguments.llama))[0]
    compile_steps(calm)
    print(f"{machine()}; texts of {arguments.tokens} tokens")
    print(f"cache of a token of text: CALM {cache_bytes(calm)} bytes, Transformer {cache_bytes(llama)} bytes")
    print("\n| batch | what writes | tokens/s | times `generate` | first token, ms |\n|---|---|---|---|---|")
    made = arguments.made / f"{arguments.llama.resolve().parent.name}_{arguments.threads}"
    optional = optional_engines(llama, arguments.llama, made, arguments.without)
    for batch in arguments.batches:
        engines: dict[str, Engine] = {
            REFERENCE: Generate(llama),
            "Transformer, compiled": Compiled(llama, made, batch),
            **optional,
        }
        if batch > MOST_ROWS and engines.pop(GENAI, None):
            print(f"| {batch} | {GENAI} | takes {MOST_ROWS} texts at most | | |")
        prompt_RT = torch.randint(4, calm.config.vocab_size, (batch, PROMPT))
        check(calm, engines, prompt_RT)
        writers: dict[str, Callable[[int], Any]] = {
            name: partial(engine.write, prompt_RT) for name, engine in engines.items()
        }
        writers["CALM, generate"] = partial(by_chunks, calm, prompt_RT, disable_compile=True)
        writers["CALM, compiled"] = partial(by_chunks, calm, prompt_RT)
        show(writers, batch, calm.config.chunk_size, arguments.tokens, arguments.rounds)


def optional_engines(llama: Any, folder: Path, made: Path, without: list[str]) -> dict[str, Engine]:
    """The optional engines that are installed and not excluded, by name."""
    known: dict[str, tuple[str, Callable[[], Engine]]] = {
        "Transformer, ONNX Runtime": ("onnxruntime", lambda: OnnxRuntime(llama, made)),
        GENAI: ("onnxruntime_genai", lambda: OnnxGenai(folder, made / "genai")),
        "Transformer, OpenVINO": ("openvino", lambda: OpenVino(llama)),
    }
    engines = {}
    for name, (module, make) in known.items():
        if module in without:
            continue
        if importlib.util.find_spec(module) is None:
            print(f"{name}: not installed")
        else:
            engines[name] = make()
    return engines


def check(calm: Any, engines: dict[str, Engine], prompt_RT: Tensor) -> None:
    """Exit unless all engines write the same text at T = 0, and the compiled CALM nearly the plain one's."""
    expected_RT = engines[REFERENCE].write(prompt_RT, CHECKED, GREEDY)
    for name, engine in engines.items():
        same = (engine.write(prompt_RT, CHECKED, GREEDY) == expected_RT).float().mean().item()
        if same < 1:
            raise SystemExit(f"{name} writes other tokens than generate at T = 0 ({1 - same:.2%} of them).")
    plain, compiled = (
        by_chunks(calm, prompt_RT, CHECKED, disable_compile=is_plain) for is_plain in (True, False)
    )
    differing = (plain != compiled).any(-1).float().mean().item()
    if differing > MAX_SHARE_DIFFERING:
        raise SystemExit(
            f"the compiled CALM writes another text than the plain one in {differing:.0%} of rows."
        )


def by_chunks(calm: Any, prompt_RT: Tensor, num_tokens: int, **settings: Any) -> Tensor:
    """Continue prompts with a CALM at T = 1, (R, T + new)."""
    text_RT: Tensor = calm.generate(
        prompt_RT, max_new_tokens=num_tokens, temperature=1.0, seed=0, eos_token_id=[], **settings
    )
    assert text_RT.shape[1] == prompt_RT.shape[1] + num_tokens
    return text_RT


def show(writers: dict[str, Callable[[int], Any]], batch: int, size: int, tokens: int, rounds: int) -> None:
    """Time all writers in turns, and print one row for each.

    Args:
        writers: Name -> a function that writes a given number of tokens.
        batch: Texts per call.
        size: Tokens of a CALM's chunk.
        tokens: Tokens per text.
        rounds: Timed rounds.
    """
    shortest = {
        name: partial(write, size if name.startswith("CALM") else 1) for name, write in writers.items()
    }
    first = in_turns(shortest, 2 * rounds)
    times = in_turns({name: partial(write, tokens) for name, write in writers.items()}, rounds)
    for name, (median, ratio, least, most) in ratios(times, REFERENCE).items():
        spread = f"{batch * tokens / max(times[name]):,.0f} to {batch * tokens / min(times[name]):,.0f}"
        print(
            f"| {batch} | {name} | {batch * tokens / median:,.0f} ({spread}) | "
            f"{ratio:.1f} ({least:.1f} to {most:.1f}) | {1000 * statistics.median(first[name]):.1f} |",
            flush=True,
        )


def cache_bytes(model: Any) -> int:
    """Bytes of keys and values per token of text."""
    config = getattr(model.config, "backbone", model.config)
    size = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    chunk_size: int = getattr(model.config, "chunk_size", 1)
    return int(2 * config.num_hidden_layers * size * model.dtype.itemsize // chunk_size)


if __name__ == "__main__":
    main()
