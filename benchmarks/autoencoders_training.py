"""How the models of autoencoders.py are trained, and what changes an autoencoder.

Shapes: B rows, C chunks, P positions, K tokens of a chunk, D hidden size, Z latent size, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm.core.chunks import find_targets, split_into_chunks
from calm.core.gaussian import DiagonalGaussian
from calm.data.prepare import prepare
from calm.data.prepared import PreparedData, load_prepared
from calm.data.stories import write_stories
from calm.models.autoencoder import CalmAutoencoder
from calm.models.calm import CalmForCausalLM
from calm.models.heads import Target
from calm.models.tokens import LlamaForCausalLM
from calm.training.build import new_autoregressive_model
from calm.training.optimizers import build_optimizer, build_scheduler
from calm.training.recipe import Recipe, TrainingSettings
from calm.training.recipe_files import read_recipe, with_settings

NUM_STORIES = 12_000
STEPS, LAST_STEPS = 1100, 600
"""Of the autoencoder alone, and of the language model."""
SETTINGS = {
    "data.context": 256,
    "language_model.hidden_size": 128,
    "language_model.intermediate_size": 352,
    "language_model.num_layers": 3,
    "language_model.training.steps": LAST_STEPS,
    "autoencoder.training.steps": STEPS,
}
Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Joint:
    """How an autoencoder learns beside the language model.

    Args:
        weight: Of the energy distance between the head's draws and its latents; 0: only its own loss.
        rate: Of its learning rates, relative to those of its own training.
    """

    weight: float
    rate: float = 0.1


class Learning(Protocol):
    """Something else that an autoencoder learns: a module whose loss is added to its own."""

    def loss(self, autoencoder: CalmAutoencoder, batch: Batch) -> Tensor:
        """The loss of a batch, weighted."""


def recipe_of(seed: int, settings: dict[str, Any], name: str = "demo") -> Recipe:
    """A shipped recipe at the sizes of the study."""
    return with_settings(read_recipe(name), {"seed": seed, **SETTINGS, **settings})


def prepared_stories(output: Path) -> PreparedData:
    """Stories, tokenized; the same for all."""
    if not (output / "data").is_dir():
        write_stories(output / "stories.jsonl", 0, NUM_STORIES)
        prepare([str(output / "stories.jsonl")], output / "data", vocab_size=2048, num_proc=1)
    return load_prepared(output / "data")


def batches_of(data: PreparedData, recipe: Recipe, stage: str, seed: int) -> Iterator[Batch]:
    """Batches of a stage without end, in an order of the seed's."""
    chunk_size = recipe.chunk_size if recipe.model == "calm" else 1
    blocks = data.blocks("train", chunk_size=chunk_size, block_size=recipe.data.context)
    columns = blocks[:]
    rows = getattr(recipe, stage).training.batch_tokens // recipe.data.context
    generator = torch.Generator().manual_seed(seed)
    while True:
        for part in torch.randperm(len(blocks), generator=generator).split(rows):
            if len(part) == rows:
                yield {name: columns[name][part] for name in ("input_ids", "labels", "position_ids")}


class _Steps:
    """Optimizer and schedule of a module."""

    def __init__(self, module: nn.Module, settings: TrainingSettings, steps: int) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(module, settings.optimizer)
        self.scheduler = build_scheduler(self.optimizer, settings.optimizer, steps)

    def take(self) -> None:
        """Move along the gradients that there are, and forget them."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


def learn(
    autoencoder: CalmAutoencoder,
    recipe: Recipe,
    batches: Iterator[Batch],
    steps: int,
    other: Learning | None,
    seed: int,
) -> None:
    """Train an autoencoder by its own loss, and by another beside it."""
    modules = nn.ModuleList([autoencoder])
    if isinstance(other, nn.Module):
        modules.append(other)
    moves, generator = (
        _Steps(modules, recipe.autoencoder.training, steps),
        torch.Generator().manual_seed(seed),
    )
    autoencoder.train()
    for _, batch in zip(range(steps), batches, strict=False):
        loss = autoencoder(batch["input_ids"], batch["labels"], generator).loss
        if other is not None:
            loss = loss + other.loss(autoencoder, batch)
        loss.backward()
        moves.take()


def slower(settings: TrainingSettings, rate: float) -> TrainingSettings:
    """The same with learning rates that are so many times as high."""
    own = settings.optimizer
    own = dataclasses.replace(
        own, learning_rate=rate * own.learning_rate, adamw_learning_rate=rate * own.adamw_learning_rate
    )
    return dataclasses.replace(settings, optimizer=own)


def learn_together(
    model: CalmForCausalLM, recipe: Recipe, batches: Iterator[Batch], joint: Joint | None, seed: int
) -> None:
    """Train a language model, and the autoencoder inside with it if it is told to."""
    settings, generator = recipe.language_model.training, torch.Generator().manual_seed(seed)
    model.train()
    moves, autoencoder, others = _Steps(model, settings, settings.steps), model.autoencoder, None
    if joint is not None:
        autoencoder.requires_grad_(True).train()
        others = _Steps(autoencoder, slower(recipe.autoencoder.training, joint.rate), settings.steps)
    for _, batch in zip(range(settings.steps), batches, strict=False):
        if joint is None or others is None:
            model(**batch, generator=generator).loss.backward()
        else:
            own = autoencoder(batch["input_ids"], batch["labels"], generator).loss
            (own + _energy(model, batch, joint.weight, generator)).backward()
            others.take()
        moves.take()
    autoencoder.requires_grad_(False).eval()


def _energy(model: CalmForCausalLM, batch: Batch, weight: float, generator: torch.Generator) -> Tensor:
    """The head's loss, whose gradient reaches the posteriors as well, with that weight.

    The language model learns as it does from a frozen autoencoder, whatever the weight.
    """
    is_target_BC = find_targets(batch["labels"], batch["position_ids"], model.config.chunk_size)
    states_BCD = model.hidden_states_of_chunks(batch["input_ids"], position_ids=batch["position_ids"])
    tokens_PK = split_into_chunks(batch["input_ids"], model.config.chunk_size)[:, 1:][is_target_BC]
    states_PD = states_BCD[:, :-1][is_target_BC]
    noise = model.head.draw_noise(len(tokens_PK), generator)
    posterior = model.autoencoder.encode(tokens_PK)
    fixed = DiagonalGaussian(posterior.mean.detach(), posterior.log_std.detach())
    loss = model.head.loss(states_PD, Target(fixed, tokens_PK), noise).mean()
    if not weight:
        return loss
    head: Any = model.head
    with torch.no_grad():
        draws_NPZ = head.sample_latents(states_PD, head.config.num_draws, noise=noise.head)
    # Against a head that stands still, and of latents brought to a mean of 0 and a spread of 1: otherwise
    # smaller ones would always be better.
    mean_Z, std_Z = posterior.mean.mean(0), posterior.mean.std(0) + 1e-6
    draws_NPZ = (draws_NPZ - mean_Z.detach()) / std_Z.detach()
    one_1PZ, other_1PZ = ((posterior.sample(1, generator) - mean_Z) / std_Z for _ in range(2))
    distance_P = 2 * (draws_NPZ - one_1PZ).norm(dim=-1).mean(0) - (one_1PZ - other_1PZ).norm(dim=-1)[0]
    return loss + weight * distance_P.mean()


def with_autoencoder(model: CalmForCausalLM, autoencoder: CalmAutoencoder) -> CalmForCausalLM:
    """The model, with this autoencoder inside."""
    model.autoencoder = autoencoder
    model.head.attach(autoencoder)
    return model.train()


class _Attending(nn.Module):
    """A block of an autoencoder behind attention among the tokens of a chunk."""

    def __init__(self, block: nn.Module, size: int, chunk_size: int) -> None:
        super().__init__()
        self.block, self.norm = block, nn.RMSNorm(size, eps=1e-6)
        self.places = nn.Parameter(torch.zeros(chunk_size, size))
        self.attention = nn.MultiheadAttention(size, 4, batch_first=True, bias=False)

    def forward(self, hidden_PKD: Tensor) -> Tensor:
        rows = self.norm(hidden_PKD + self.places).flatten(0, -3)
        attended = self.attention(rows, rows, rows, need_weights=False)[0]
        return self.block(hidden_PKD + attended.view(hidden_PKD.shape))


def attend(autoencoder: CalmAutoencoder) -> None:
    """Let the tokens of a chunk attend to each other in front of every block that works on tokens."""
    config = autoencoder.config
    encoder: Any = autoencoder.encoder.blocks
    decoder: Any = autoencoder.decoder.blocks
    ours = [(encoder, range(len(encoder) // 2)), (decoder, range(len(decoder) // 2, len(decoder)))]
    for blocks, numbers in ours:
        for number in numbers:
            blocks[number] = _Attending(blocks[number], config.hidden_size, config.chunk_size)


class NextChunk(nn.Module):
    """A latent also has to tell the tokens of the chunk behind its own."""

    def __init__(self, autoencoder: CalmAutoencoder, weight: float = 0.3) -> None:
        super().__init__()
        config = autoencoder.config
        self.weight, self.size = weight, config.hidden_size
        self.out = nn.Linear(config.latent_size, config.chunk_size * config.hidden_size)

    def loss(self, autoencoder: CalmAutoencoder, batch: Batch) -> Tensor:
        """Cross-entropy of the next chunk's tokens, each alone, from the latent's mean."""
        chunk_size = autoencoder.config.chunk_size
        is_target_BC = find_targets(batch["labels"], batch["position_ids"], chunk_size)
        chunks_BCK = split_into_chunks(batch["input_ids"], chunk_size)
        mean_PZ = autoencoder.encode(chunks_BCK[:, :-1][is_target_BC]).mean
        vectors_PKD = self.out(mean_PZ).unflatten(-1, (chunk_size, self.size))
        scores = F.linear(vectors_PKD, autoencoder.encoder.embed_tokens.weight)
        return (
            self.weight
            * chunk_size
            * F.cross_entropy(scores.flatten(0, 1), chunks_BCK[:, 1:][is_target_BC].flatten())
        )


class Align(nn.Module):
    """A latent also has to tell what a Transformer's state is after its chunk."""

    def __init__(self, autoencoder: CalmAutoencoder, teacher: LlamaForCausalLM, weight: float = 1.0) -> None:
        super().__init__()
        self.weight, self._teacher = weight, (teacher,)
        self.out = nn.Linear(autoencoder.config.latent_size, teacher.config.hidden_size)

    def loss(self, autoencoder: CalmAutoencoder, batch: Batch) -> Tensor:
        """One minus the cosine between the state and a linear map of the latent's mean."""
        chunk_size, (teacher,) = autoencoder.config.chunk_size, self._teacher
        tokens = batch["input_ids"]
        with torch.no_grad():
            states = teacher.model(tokens).last_hidden_state[:, chunk_size - 1 :: chunk_size]
        is_whole = (split_into_chunks(batch["labels"], chunk_size) >= 0).all(-1)
        mean_PZ = autoencoder.encode(split_into_chunks(tokens, chunk_size)[is_whole]).mean
        return self.weight * (1 - F.cosine_similarity(self.out(mean_PZ), states[is_whole], dim=-1)).mean()


def teacher_of(data: PreparedData, output: Path) -> LlamaForCausalLM:
    """A Transformer that has learned the stories; the same for all."""
    recipe = recipe_of(1, {}, "demo_baseline")
    model, file = new_autoregressive_model(recipe, data), output / "weights" / "transformer.pt"
    if not file.exists():
        settings = recipe.language_model.training
        moves = _Steps(model, settings, settings.steps)
        for _, batch in zip(
            range(settings.steps), batches_of(data, recipe, "language_model", 1), strict=False
        ):
            model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
            moves.take()
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file))
    return model.requires_grad_(False).eval()
