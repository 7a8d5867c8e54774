"""How fast are training and generation on a GPU, and what does the energy loss cost there?

A part of `benchmarks/gpu.py`. It trains shipped recipes at their real sizes, on random tokens.
"""

import functools
import math
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import energy
import torch
import training_step
from generation import compiled, count, llama_like, random_prompts, writers
from measure import DEVICE, Cases, Row, free, in_turns, peak, ratios, reset_peak
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from calm.flops import training_flops
from calm.hardware import matrix_rate
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmConfig
from calm.training.build import model_config
from calm.training.optimizers import build_optimizer
from calm.training.recipe import Recipe
from calm.training.recipe_files import read_recipe, with_settings

# Recipe -> vocabulary size.
RECIPES = {"one_gpu": 32_000, "calm_m": 128_256}
# Attention, and whether compiled. Quick and important cases come first, because time may run out.
TRAINING_MODES = (("sdpa", False), ("sdpa", True), ("flash_attention_2", True))
BATCHES = (1, 64, 8)
TEMPERATURES = (1.0, 0.5)
CHUNKS_PER_DOCUMENT = 256
"""In recipes whose documents do not see each other."""
TOY = {
    "data.context": 64,
    "autoencoder.latent_size": 8,
    "autoencoder.hidden_size": 16,
    "autoencoder.intermediate_size": 16,
    "language_model.hidden_size": 32,
    "language_model.intermediate_size": 32,
    "language_model.num_layers": 1,
    "language_model.num_heads": 2,
    "language_model.training.microbatch_tokens": 128,
    "language_model.head.num_blocks": 1,
}
TOY_VOCABULARY = 300
# Peak TFLOP/s of dense bf16 products with float32 sums; from NVIDIA's data sheets.
PEAKS = {
    r"NVIDIA A100(-SXM4-\d+GB|-PCIE-40GB| 80GB PCIe)": 312,
    r"NVIDIA A40": 149.7,
    r"NVIDIA L4": 121,
    r"NVIDIA L40S": 362,
    r"NVIDIA H100 80GB HBM3": 989.4,
    r"NVIDIA H100 PCIe": 756,
    r"NVIDIA H200": 989.4,
    r"NVIDIA B200": 2250,
    r"NVIDIA GeForce RTX 3090": 71,
    r"NVIDIA GeForce RTX 4090": 165.2,
}


def bf16_peak(name: str) -> tuple[float, str]:
    """Peak bf16 FLOPs per second of a card, and where the number comes from.

    Args:
        name: The card's name; if it is not in `PEAKS`, a matrix product is measured.
    """
    for pattern, peak_of_card in PEAKS.items():
        if re.fullmatch(pattern, name):
            return peak_of_card * 1e12, "data sheet"
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    return matrix_rate(torch.device(DEVICE), dtype) or math.nan, "measured by a matrix product"


# Training.


def training_cases(card: str, is_toy: bool, rounds: int = 10) -> Cases:
    """Cases: each recipe with each attention, compiled and not.

    Args:
        card: Name of the GPU.
        is_toy: Whether to use tiny models, which are traced instead of compiled.
        rounds: Timed steps.
    """
    cases: Cases = {}
    for attention, is_compiled in TRAINING_MODES:
        for name, vocab_size in RECIPES.items():
            settings = {"language_model.attention": attention} | (TOY if is_toy else {})
            recipe = with_settings(read_recipe(name), settings)
            backend = None if not is_compiled else "eager" if is_toy else "inductor"
            title = f"{name}, {attention}{', compiled' if is_compiled else ''}"
            size = TOY_VOCABULARY if is_toy else vocab_size
            cases[title] = partial(_train, recipe, size, backend, card, rounds)
    return cases


def _train(
    recipe: Recipe, vocab_size: int, backend: str | None, card: str, rounds: int, until: float
) -> list[Row]:
    settings = recipe.language_model
    if settings.attention == "flash_attention_2" and not is_flash_attn_2_available():
        return [{"note": "left out: flash_attention_2 (package flash-attn) is not installed"}]
    config: Any = model_config(recipe, vocab_size)
    blocks = (settings.training.microbatch_tokens or recipe.data.context) // recipe.data.context
    while True:
        try:
            seconds, memory = _steps(recipe, config, blocks, backend, rounds, until)
            break
        except torch.OutOfMemoryError:
            if blocks == 1:
                raise
        blocks //= 2
        free()  # Outside of the handler, because the error keeps tensors alive.
    rates = [blocks * recipe.data.context / duration for duration in seconds]
    flops, (peak_rate, _) = training_flops(config, recipe.data.context), bf16_peak(card)
    return [
        {
            "batch": f"{blocks} x {recipe.data.context}",
            **_spread(rates),
            "utilisation": statistics.median(rates) * flops / peak_rate,
            "memory, GiB": memory / 2**30,
            **_rounds(seconds, rounds),
        }
    ]


def _steps(
    recipe: Recipe, config: CalmConfig, blocks: int, backend: str | None, rounds: int, until: float
) -> tuple[list[float], int]:
    """Seconds of each step, and peak memory in bytes."""
    step = training_step_of(recipe, config, blocks, backend)
    reset_peak()
    return in_turns({"": step}, rounds, warm_up=2, until=until)[""], peak()


def training_step_of(
    recipe: Recipe, config: CalmConfig, blocks: int, backend: str | None
) -> Callable[[], Tensor]:
    """A function that runs an optimizer step of a recipe on random tokens, in bf16, and returns the loss.

    Args:
        recipe: The recipe.
        config: Configuration of its model.
        blocks: Blocks per batch.
        backend: Backend of torch.compile; None does not compile.
    """
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = CalmForCausalLM(config).train()
        ids = torch.randint(4, config.vocab_size, (blocks, recipe.data.context))
        position_C = torch.arange(recipe.data.context // config.chunk_size)
    if recipe.data.layout == "documents":
        position_C = position_C % CHUNKS_PER_DOCUMENT
    optimizer = build_optimizer(model, recipe.language_model.training.optimizer)
    forward: Any = model if backend is None else torch.compile(model, backend=backend)
    generators = [torch.Generator(DEVICE).manual_seed(number) for number in range(blocks)]
    inputs = {"input_ids": ids, "labels": ids, "position_ids": position_C.repeat(blocks, 1)}

    def compute_loss() -> Tensor:
        noise = model.draw_training_noise(generators, **inputs)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss: Tensor = forward(**inputs, noise=noise).loss
        return loss

    return partial(training_step.take_step, model, optimizer, compute_loss)


# The energy loss.


def energy_cases(is_toy: bool, rounds: int = 7) -> Cases:
    """Cases: the three energy losses in turns, by themselves and in a training step; in float32."""
    sizes = (16, 8, 8, 100) if is_toy else (4096, 128, 8, 100)
    batch = (1, 64) if is_toy else (8, 4096)
    return {
        "loss alone": partial(_compare, partial(_checked_losses, sizes), rounds),
        f"step of {batch[0]} x {batch[1]} tokens": partial(
            _compare, partial(_all_losses, training_step.step, batch), rounds
        ),
    }


def _all_losses(step: Callable[..., Any], sizes: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    return {name: step(name, *sizes) for name in ("literal", "ours", "integrated")}


def _checked_losses(sizes: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    steps = _all_losses(energy.step, sizes)
    energy.check_same(steps["literal"], steps["ours"])
    return steps


def _compare(build: Callable[[], dict[str, Callable[[], Any]]], rounds: int, until: float) -> list[Row]:
    steps, rows = build(), []
    times = in_turns(steps, rounds, until=until)
    for name, (seconds, ratio, least, most) in ratios(times, "literal").items():
        reset_peak()
        before = peak()
        steps[name]()
        rows.append(
            {
                "way": name,
                "ms": 1000 * seconds,
                "times as fast": ratio,
                "least": least,
                "most": most,
                "memory, MiB": max(0, peak() - before) / 2**20,
                **_rounds(times[name], rounds),
            }
        )
    return rows


# Writing.


def writing_cases(is_toy: bool, rounds: int = 5) -> Cases:
    """Cases, one per batch size: the CALM of recipe one_gpu and an equally large Llama, compiled and not."""
    return {f"batch {batch}": partial(_write, is_toy, rounds, batch) for batch in BATCHES}


@functools.cache
def _writers(is_toy: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    recipe = with_settings(read_recipe("one_gpu"), TOY if is_toy else {})
    config: Any = model_config(recipe, TOY_VOCABULARY if is_toy else RECIPES["one_gpu"])
    calm: Any = CalmForCausalLM(config)
    torch.nn.init.normal_(calm.head.out.weight, std=0.2)
    llama: Any = llama_like(calm)
    return calm.eval().to(DEVICE, torch.bfloat16), llama.to(torch.bfloat16)


def _write(is_toy: bool, rounds: int, batch: int, until: float) -> list[Row]:
    calm, llama = _writers(is_toy)
    tokens, options, rows = 8 if is_toy else 128, compiled("eager" if is_toy else "inductor"), []
    prompts = random_prompts(calm, batch)
    for index, temperature in enumerate(TEMPERATURES):
        by_chunks, by_tokens = writers(calm, llama, prompts, tokens, temperature)
        functions: dict[str, Callable[[], None]] = {
            "baseline": by_tokens,
            "CALM": by_chunks,
            "baseline, compiled": partial(by_tokens, **options),
            "CALM, compiled": partial(by_chunks, **options),
        }
        now = time.perf_counter()
        times = in_turns(functions, rounds, until=now + (until - now) / (len(TEMPERATURES) - index))
        table = ratios(times, "baseline")
        rows += [
            {
                "T": temperature,
                "way": name,
                "parameters, M": count(calm if name.startswith("CALM") else llama) / 1e6,
                **_spread([batch * tokens / duration for duration in seconds]),
                "times as fast": table[name][1],
                **_rounds(seconds, rounds),
            }
            for name, seconds in times.items()
        ]
    return rows


def _spread(rates: list[float]) -> Row:
    return {"tokens/s": statistics.median(rates), "least": min(rates), "most": max(rates)}


def _rounds(seconds: list[float], expected: int) -> Row:
    return {} if len(seconds) == expected else {"note": f"shortened: {len(seconds)} of {expected} rounds"}
