"""What does low temperature cost, and how near does each sampler come to the tempered distribution?

    python benchmarks/temperature.py speed runs/demo/model
    python benchmarks/temperature.py speed --random      # 128,256 tokens, CALM-M sizes, 2 layers
    python benchmarks/temperature.py distribution runs/demo

`speed` writes with every sampler in turns, round after round in one run, and prints medians, with
tokens per second also as a ratio to the yardstick: the pool rule written the obvious way (all
logits of all draws in memory, chunks counted in Python, row by row). "whole" reads all tokens of all
draws, as is done for small vocabularies; large ones are read only as far as needed. `distribution` draws a
large reference for held-out contexts, then runs the samplers on the reference distribution and measures their
total variation distance to the tempered one; "ideal" draws from the tempered distribution itself, which shows
what part of a distance is due to the finite number of trials.
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
    """The paper's rule for T = 1/n as one would first write it."""
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
    made_R = torch.full((len(chosen),), num_draws)
    return ChunkSample(torch.tensor(chosen), made_R, made_R, made_R < 0, made_R.double())


def samplers_at(temperature: float, budgets: Sequence[int]) -> dict[str, Sampler | None]:
    """Name -> settings; None is the yardstick."""
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
    settings: Sampler | None,
    temperature: float,
    num_chunks: int,
    seed: int,
    whole: bool = False,
) -> tuple[float, float, float]:
    """Tokens per second and draws per chunk of one call of generate."""
    options: dict[str, Any] = {}
    large = sampling._LARGE_PROJECTION
    sampling._LARGE_PROJECTION = sys.maxsize if whole else large
    if settings is None:
        options = {"cache_implementation": "dynamic"}  # Nothing of ours is in the yardstick.
        model.__dict__["sample_chunks"] = lambda hidden, *_: literal_pool(model, hidden, temperature)
    else:
        options = {"sampler": settings}
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
    """CALM-M with two layers and random weights; `spread` sets how far its draws lie apart."""
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
        model.config.eos_token_id = model.generation_config.eos_token_id = None  # Equal lengths for all.
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
    """Write with all samplers in turns, and print a line for each."""
    table = samplers_at(temperature, arguments.budgets)
    if arguments.random:
        table |= {key + WHOLE: settings for key, settings in table.items() if settings is not None}
    rounds: dict[str, list[tuple[float, float, float]]] = {key: [] for key in table}
    for repeat in range(arguments.rounds):
        for key, settings in table.items():
            rounds[key].append(
                write(model, prompts, settings, temperature, arguments.chunks, repeat, key.endswith(WHOLE))
            )
    yardstick = [rate for rate, *_ in rounds.get(LITERAL, [])]
    for key, runs in rounds.items():
        rates, draws, fell = zip(*runs, strict=True)
        ratio = ""
        if yardstick:
            ratio = f"{statistics.median(a / b for a, b in zip(rates, yardstick, strict=True)):.1f}x, "
        print(
            f"{label}  {key:18s}: {statistics.median(rates):8.1f} ({min(rates):.1f} to {max(rates):.1f}), "
            f"{ratio}{statistics.mean(draws):.1f}, {statistics.mean(fell):.1%}",
            flush=True,
        )


@torch.no_grad()
def reference_distributions(
    folder: Path, num_contexts: int, num_draws: int, block: int = 4000
) -> Iterator[Tensor]:
    """Frequencies of all outcomes at held-out contexts spread over the text."""
    model = CalmForCausalLM.from_pretrained(folder / "model").eval()
    size = model.config.chunk_size
    blocks = load_prepared(folder / "data").blocks("validation", chunk_size=size, block_size=512, seed=1)
    batch = {name: values[:16] for name, values in blocks[:16].items()}
    hidden_BCD = model.hidden_states_of_chunks(batch["input_ids"], position_ids=batch["position_ids"])
    hidden_PD = hidden_BCD[:, :-1][find_targets(batch["labels"], batch["position_ids"], size)]
    chosen = torch.linspace(0, len(hidden_PD) - 1, num_contexts).long()
    generator = torch.Generator().manual_seed(0)
    for done, hidden_D in enumerate(hidden_PD[chosen]):
        parts = [
            model.draw_chunks(hidden_D[None], min(block, num_draws - start), generator)[:, 0]
            for start in range(0, num_draws, block)
        ]
        _, counts_V = torch.unique(torch.cat(parts), dim=0, return_counts=True)
        if done % 20 == 0:
            print(f"reference {done}/{num_contexts}", flush=True)
        yield counts_V.double() / num_draws


def draw_outcomes(
    cumulative_V: Tensor,
    generator: torch.Generator,
    num_draws: int,
    rows_R: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Draws of a distribution that is the same for all rows, (N, R, 1)."""
    uniform = torch.rand((num_draws, len(rows_R)), generator=generator, dtype=torch.float64)
    outcome = torch.searchsorted(cumulative_V, uniform, right=True).clamp_max(len(cumulative_V) - 1)
    return outcome.unsqueeze(-1)


def distribution(arguments: argparse.Namespace) -> None:
    """Distances of every sampler to the tempered distribution."""
    generator = torch.Generator().manual_seed(1)
    distances: dict[tuple[float, str], list[float]] = collections.defaultdict(list)
    costs: dict[tuple[float, str], list[tuple[float, float]]] = collections.defaultdict(list)
    for p_V in reference_distributions(Path(arguments.folder), arguments.contexts, arguments.draws):
        cumulative_V = p_V.cumsum(0)

        draw = partial(draw_outcomes, cumulative_V, generator)

        for temperature in arguments.temperatures:
            wanted_V = p_V ** (1 / temperature)
            wanted_V = wanted_V / wanted_V.sum()
            for key, settings in {**samplers_at(temperature, arguments.budgets), "ideal": None}.items():
                if key == "ideal":
                    found = torch.multinomial(
                        wanted_V, arguments.trials, replacement=True, generator=generator
                    )
                elif settings is None:
                    continue  # The literal pool has the distribution of the pool.
                else:
                    result = settings.sample(draw, arguments.trials, generator)
                    found = result.chunks_RK.squeeze(-1)
                    costs[temperature, key].append(
                        (result.num_draws_R.double().mean().item(), result.fell_back_R.double().mean().item())
                    )
                share_V = torch.bincount(found, minlength=len(p_V)) / arguments.trials
                distances[temperature, key].append(0.5 * (share_V - wanted_V).abs().sum().item())
    print("T  sampler: mean total variation (standard error over contexts), draws a chunk, fall-backs")
    for (temperature, key), values in distances.items():
        error = statistics.stdev(values) / math.sqrt(len(values))
        cost = costs.get((temperature, key))
        spent = ""
        if cost:
            draws, fell = (statistics.mean(column) for column in zip(*cost, strict=True))
            spent = f", {draws:.1f}, {fell:.1%}"
        print(f"{temperature:g}  {key:9s}: {statistics.mean(values):.4f} ({error:.4f}){spent}")


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
