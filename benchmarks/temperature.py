"""What does low temperature cost, and how close does each sampler come to the tempered distribution?

    python benchmarks/temperature.py speed runs/demo/model
    python benchmarks/temperature.py speed --random      # 128,256 tokens, CALM-M sizes, 2 layers
    python benchmarks/temperature.py distribution runs/demo

`speed` generates with all samplers in turns, for several rounds in one process, and prints medians; tokens
per second also as a ratio to a literal implementation of the pool rule (all logits of all draws in memory,
chunks counted in Python, row by row). "whole" decodes all tokens of all draws, as is done for small
vocabularies; with large ones, tokens are decoded only as far as needed. `distribution` estimates the
distribution at held-out contexts from many draws, runs the samplers on that estimate, and measures their
total variation distance to the tempered one; "ideal" samples from the tempered distribution itself, which
shows what part of a distance is due to the finite number of trials.
"""

import argparse
import collections
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import calm  # noqa: F401
import calm.models.generation.sampling as sampling
from calm.core.chunks import find_targets
from calm.core.samplers import ExactSampler, PoolSampler, Sampler
from calm.core.temperature import ChunkSample
from calm.data.prepared import load_prepared
from calm.data.stories import stories
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
from calm.models.heads import LatentHead

TEMPERATURES = (1.0, 0.7, 0.5, 0.25)
POOL = 200
LITERAL = f"literal pool {POOL}"
WHOLE = " whole"


def literal_pool(model: CalmForCausalLM, hidden_PD: Tensor, temperature: float) -> ChunkSample:
    """The paper's rule for T = 1/n, written the obvious way."""
    n = round(1 / temperature)
    num_draws = 1 if n == 1 else POOL
    chosen, head = [], model.head
    assert isinstance(head, LatentHead)
    for hidden_D in hidden_PD:
        latents = head.sample_latents(hidden_D.repeat(num_draws, 1), 1)[0]
        tokens = model.autoencoder.decode(latents).argmax(-1)
        counts = collections.Counter(map(tuple, tokens.tolist()))
        for m in range(n, 0, -1):
            candidates = [chunk for chunk, count in counts.items() if count >= m]
            if candidates:
                weights = [math.comb(counts[chunk], m) for chunk in candidates]
                chosen.append(random.choices(candidates, weights)[0])
                break
    draws_R = torch.full((len(chosen),), num_draws)
    return ChunkSample(torch.tensor(chosen), draws_R, draws_R, draws_R < 0, draws_R.double())


def samplers_at(temperature: float, budgets: Sequence[int]) -> dict[str, Sampler | None]:
    """Name -> sampler; None stands for `literal_pool`."""
    table: dict[str, Sampler | None] = {
        f"exact {budget}": ExactSampler(temperature=temperature, max_draws=budget) for budget in budgets
    }
    table[f"pool {POOL}"] = PoolSampler(temperature=temperature, num_draws=POOL)
    if abs(1 / temperature - round(1 / temperature)) < 1e-6:
        table[LITERAL] = None
    return table


def write(
    model: CalmForCausalLM,
    prompts: Tensor,
    sampler: Sampler | None,
    temperature: float,
    num_chunks: int,
    seed: int,
    decode_all: bool = False,
) -> tuple[float, float, float]:
    """Tokens per second, draws per chunk, and share of fall-backs of one call of `generate`."""
    options: dict[str, Any] = {}
    large = sampling._LARGE_PROJECTION
    sampling._LARGE_PROJECTION = sys.maxsize if decode_all else large
    if sampler is None:
        options = {"cache_implementation": "dynamic"}  # The literal version gets none of our optimizations.
        model.__dict__["sample_chunks"] = lambda hidden, *_: literal_pool(model, hidden, temperature)
    else:
        options = {"sampler": sampler}
    num_tokens = num_chunks * model.config.chunk_size
    start = time.perf_counter()
    out: Any = model.generate(
        prompts,
        max_new_tokens=num_tokens,
        temperature=temperature,
        seed=seed,
        return_dict_in_generate=True,
        **options,
    )
    seconds = time.perf_counter() - start
    model.__dict__.pop("sample_chunks", None)
    sampling._LARGE_PROJECTION = large
    draws = out.num_draws.double().mean().item()
    return prompts.shape[0] * num_tokens / seconds, draws, out.fell_back.double().mean().item()


def random_model(spread: float) -> CalmForCausalLM:
    """CALM-M with two layers and random weights; `spread` sets how far apart its draws are."""
    config = CalmConfig(
        autoencoder_config=CalmAutoencoderConfig(
            vocab_size=128_256, chunk_size=4, latent_size=128, hidden_size=512, intermediate_size=1280
        ),
        backbone_config={
            "hidden_size": 1024,
            "intermediate_size": 2752,
            "num_hidden_layers": 2,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
        head_config={"head_type": "energy", "num_blocks": 4},
    )
    torch.manual_seed(0)
    model = CalmForCausalLM(config).eval()
    with torch.no_grad():
        model.head.out.weight.normal_(std=spread)
    return model


def speed(arguments: argparse.Namespace) -> None:
    """Tokens per second of every sampler."""
    if arguments.random:
        models = {f"random, spread {spread:g}": random_model(spread) for spread in arguments.spreads}
        prompt_of = {name: torch.randint(3, 1000, (16, 32)) for name in models}
    else:
        folder = Path(arguments.folder)
        model = CalmForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = tokenizer(list(stories(7, 64)))["input_ids"]
        models = {folder.name: model}
        prompt_of = {folder.name: torch.tensor([ids[:40] for ids in texts if len(ids) >= 40][:16])}
    print(
        "model  T  batch  sampler: tokens/s (min to max), ratio to the yardstick, draws a chunk, fall-backs"
    )
    for name, model in models.items():
        model.config.eos_token_id = model.generation_config.eos_token_id = (
            None  # So that all texts have the same length.
        )
        for temperature in arguments.temperatures:
            for batch in arguments.batches:
                label = f"{name}  {temperature:g}  {batch:2d}"
                compare(label, model, prompt_of[name][:batch], temperature, arguments)


def compare(
    label: str,
    model: CalmForCausalLM,
    prompts: Tensor,
    temperature: float,
    arguments: argparse.Namespace,
) -> None:
    """Generate with all samplers in turns, and print one line for each."""
    table = samplers_at(temperature, arguments.budgets)
    if arguments.random:
        table |= {key + WHOLE: sampler for key, sampler in table.items() if sampler is not None}
    rounds: dict[str, list[tuple[float, float, float]]] = {key: [] for key in table}
    for repeat in range(arguments.rounds):
        for key, sampler in table.items():
            rounds[key].append(
                write(model, prompts, sampler, temperature, arguments.chunks, repeat, key.endswith(WHOLE))
            )
    literal_rates = [rate for rate, *_ in rounds.get(LITERAL, [])]
    for key, runs in rounds.items():
        rates, draws, fall_backs = zip(*runs, strict=True)
        ratio = ""
        if literal_rates:
            ratio = f"{statistics.median(a / b for a, b in zip(rates, literal_rates, strict=True)):.1f}x, "
        print(
            f"{label}  {key:18s}: {statistics.median(rates):8.1f} ({min(rates):.1f} to {max(rates):.1f}), "
            f"{ratio}{statistics.mean(draws):.1f}, {statistics.mean(fall_backs):.1%}",
            flush=True,
        )


@torch.no_grad()
def reference_distributions(
    folder: Path, num_contexts: int, num_draws: int, block: int = 4000
) -> Iterator[Tensor]:
    """Yield the frequencies of all chunks drawn at held-out contexts, which are spread over the text."""
    model = CalmForCausalLM.from_pretrained(folder / "model").eval()
    size = model.config.chunk_size
    blocks = load_prepared(folder / "data").blocks("validation", chunk_size=size, block_size=512, seed=1)
    batch = {name: values[:16] for name, values in blocks[:16].items()}
    hidden_BCD = model.hidden_states_of_chunks(batch["input_ids"], position_ids=batch["position_ids"])
    hidden_PD = hidden_BCD[:, :-1][find_targets(batch["labels"], batch["position_ids"], size)]
    chosen = torch.linspace(0, len(hidden_PD) - 1, num_contexts).long()
    generator = torch.Generator().manual_seed(0)
    for index, hidden_D in enumerate(hidden_PD[chosen]):
        parts = [
            model.draw_chunks(hidden_D[None], min(block, num_draws - start), generator)[:, 0]
            for start in range(0, num_draws, block)
        ]
        _, counts_V = torch.unique(torch.cat(parts), dim=0, return_counts=True)
        if index % 20 == 0:
            print(f"reference {index}/{num_contexts}", flush=True)
        yield counts_V.double() / num_draws


def draw_outcomes(
    cumulative_V: Tensor,
    generator: torch.Generator,
    num_draws: int,
    rows_R: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Draws from a distribution that is the same for all rows, (N, R, 1)."""
    uniform = torch.rand((num_draws, len(rows_R)), generator=generator, dtype=torch.float64)
    outcome = torch.searchsorted(cumulative_V, uniform, right=True).clamp_max(len(cumulative_V) - 1)
    return outcome.unsqueeze(-1)


def distribution(arguments: argparse.Namespace) -> None:
    """Print the distance of every sampler to the tempered distribution."""
    generator = torch.Generator().manual_seed(1)
    distances: dict[tuple[float, str], list[float]] = collections.defaultdict(list)
    costs: dict[tuple[float, str], list[tuple[float, float]]] = collections.defaultdict(list)
    for p_V in reference_distributions(Path(arguments.folder), arguments.contexts, arguments.draws):
        cumulative_V = p_V.cumsum(0)

        draw = partial(draw_outcomes, cumulative_V, generator)

        for temperature in arguments.temperatures:
            target_V = p_V ** (1 / temperature)
            target_V = target_V / target_V.sum()
            for key, sampler in {**samplers_at(temperature, arguments.budgets), "ideal": None}.items():
                if key == "ideal":
                    outcomes = torch.multinomial(
                        target_V, arguments.trials, replacement=True, generator=generator
                    )
                elif sampler is None:
                    continue  # The literal pool has the same distribution as the pool.
                else:
                    result = sampler.sample(draw, arguments.trials, generator)
                    outcomes = result.chunks_RK.squeeze(-1)
                    costs[temperature, key].append(
                        (result.num_draws_R.double().mean().item(), result.fell_back_R.double().mean().item())
                    )
                share_V = torch.bincount(outcomes, minlength=len(p_V)) / arguments.trials
                distances[temperature, key].append(0.5 * (share_V - target_V).abs().sum().item())
    print("T  sampler: mean total variation (standard error over contexts), draws a chunk, fall-backs")
    for (temperature, key), values in distances.items():
        error = statistics.stdev(values) / math.sqrt(len(values))
        cost = costs.get((temperature, key))
        costs_shown = ""
        if cost:
            draws, fall_backs = (statistics.mean(column) for column in zip(*cost, strict=True))
            costs_shown = f", {draws:.1f}, {fall_backs:.1%}"
        print(f"{temperature:g}  {key:9s}: {statistics.mean(values):.4f} ({error:.4f}){costs_shown}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("speed")
    command.add_argument("folder", nargs="?")
    command.add_argument("--random", action="store_true")
    command.add_argument("--spreads", type=float, nargs="+", default=[0.0, 0.1])
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--chunks", type=int, default=25)
    command.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    command.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    command.add_argument("--budgets", type=int, nargs="+", default=[200])
    command.set_defaults(run=speed)
    command = commands.add_parser("distribution")
    command.add_argument("folder")
    command.add_argument("--contexts", type=int, default=200)
    command.add_argument("--draws", type=int, default=100_000)
    command.add_argument("--trials", type=int, default=2_000)
    command.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES[1:])
    command.add_argument("--budgets", type=int, nargs="+", default=[25, 50, 100, 200])
    command.set_defaults(run=distribution)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
