"""Training of the models of autoencoders.py, and the changes to their autoencoders.

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
"""Training steps of the autoencoder alone, and of the language model."""
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
    """How an autoencoder is trained together with the language model.

    Args:
        weight: Weight of the energy distance between the head's draws and the latents; with 0, the
            autoencoder has only its own loss.
        rate: Factor on the learning rates of the autoencoder's recipe.
    """

    weight: float
    rate: float = 0.1


class Objective(Protocol):
    """An additional objective of an autoencoder: its loss is added to the autoencoder's own."""

    def loss(self, autoencoder: CalmAutoencoder, batch: Batch) -> Tensor:
        """The weighted loss of a batch."""


def recipe_of(seed: int, settings: dict[str, Any], name: str = "demo") -> Recipe:
    """A shipped recipe at the sizes of the study."""
    return with_settings(read_recipe(name), {"seed": seed, **SETTINGS, **settings})


def prepared_stories(output: Path) -> PreparedData:
    """The tokenized stories, which all models share."""
    if not (output / "data").is_dir():
        write_stories(output / "stories.jsonl", 0, NUM_STORIES)
        prepare([str(output / "stories.jsonl")], output / "data", vocab_size=2048, num_proc=1)
    return load_prepared(output / "data")


def batches_of(data: PreparedData, recipe: Recipe, stage: str, seed: int) -> Iterator[Batch]:
    """Endless batches of a stage, in an order that depends on the seed."""
    chunk_size = recipe.chunk_size if recipe.model == "calm" else 1
    blocks = data.blocks("train", chunk_size=chunk_size, block_size=recipe.data.context)
    columns = blocks[:]
    rows = getattr(recipe, stage).training.batch_tokens // recipe.data.context
    generator = torch.Generator().manual_seed(seed)
    while True:
        for part in torch.randperm(len(blocks), generator=generator).split(rows):
            if len(part) == rows:
                yield {name: columns[name][part] for name in ("input_ids", "labels", "position_ids")}


class _Updates:
    """Optimizer and schedule of a module."""

    def __init__(self, module: nn.Module, settings: TrainingSettings, steps: int) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(module, settings.optimizer)
        self.scheduler = build_scheduler(self.optimizer, settings.optimizer, steps)

    def step(self) -> None:
        """Update the parameters with the accumulated gradients, then clear these."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


def train_autoencoder(
    autoencoder: CalmAutoencoder,
    recipe: Recipe,
    batches: Iterator[Batch],
    steps: int,
    objective: Objective | None,
    seed: int,
) -> None:
    """Train an autoencoder by its own loss, and by a further objective if there is one."""
    modules = nn.ModuleList([autoencoder])
    if isinstance(objective, nn.Module):
        modules.append(objective)
    updates = _Updates(modules, recipe.autoencoder.training, steps)
    generator = torch.Generator().manual_seed(seed)
    autoencoder.train()
    for _, batch in zip(range(steps), batches, strict=False):
        loss = autoencoder(batch["input_ids"], batch["labels"], generator).loss
        if objective is not None:
            loss = loss + objective.loss(autoencoder, batch)
        loss.backward()
        updates.step()


def scale_rates(settings: TrainingSettings, rate: float) -> TrainingSettings:
    """The settings with both learning rates multiplied by `rate`."""
    optimizer = settings.optimizer
    optimizer = dataclasses.replace(
        optimizer,
        learning_rate=rate * optimizer.learning_rate,
        adamw_learning_rate=rate * optimizer.adamw_learning_rate,
    )
    return dataclasses.replace(settings, optimizer=optimizer)


def train_language_model(
    model: CalmForCausalLM, recipe: Recipe, batches: Iterator[Batch], joint: Joint | None, seed: int
) -> None:
    """Train a language model, jointly with its autoencoder if `joint` is given."""
    settings, generator = recipe.language_model.training, torch.Generator().manual_seed(seed)
    model.train()
    updates, autoencoder = _Updates(model, settings, settings.steps), model.autoencoder
    autoencoder_updates = None
    if joint is not None:
        autoencoder.requires_grad_(True).train()
        autoencoder_updates = _Updates(
            autoencoder, scale_rates(recipe.autoencoder.training, joint.rate), settings.steps
        )
    for _, batch in zip(range(settings.steps), batches, strict=False):
        if joint is None or autoencoder_updates is None:
            model(**batch, generator=generator).loss.backward()
        else:
            loss = autoencoder(batch["input_ids"], batch["labels"], generator).loss
            (loss + _energy(model, batch, joint.weight, generator)).backward()
            autoencoder_updates.step()
        updates.step()
    autoencoder.requires_grad_(False).eval()


def _energy(model: CalmForCausalLM, batch: Batch, weight: float, generator: torch.Generator) -> Tensor:
    """The head's loss, plus a weighted energy distance whose gradient reaches the posteriors.

    Whatever the weight, the language model gets the same gradient as from a frozen autoencoder.
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
    # The head is held fixed here, and latents are standardized: otherwise smaller ones would always be
    # better.
    mean_Z, std_Z = posterior.mean.mean(0), posterior.mean.std(0) + 1e-6
    draws_NPZ = (draws_NPZ - mean_Z.detach()) / std_Z.detach()
    first_1PZ, second_1PZ = ((posterior.sample(1, generator) - mean_Z) / std_Z for _ in range(2))
    distance_P = 2 * (draws_NPZ - first_1PZ).norm(dim=-1).mean(0) - (first_1PZ - second_1PZ).norm(dim=-1)[0]
    return loss + weight * distance_P.mean()


def with_autoencoder(model: CalmForCausalLM, autoencoder: CalmAutoencoder) -> CalmForCausalLM:
    """The model, with its autoencoder replaced by this one."""
    model.autoencoder = autoencoder
    model.head.attach(autoencoder)
    return model.train()


class _Attending(nn.Module):
    """A block of an autoencoder, preceded by attention among the tokens of a chunk."""

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
    """Put attention among the tokens of a chunk in front of every block that works on tokens."""
    config = autoencoder.config
    encoder: Any = autoencoder.encoder.blocks
    decoder: Any = autoencoder.decoder.blocks
    token_blocks = [(encoder, range(len(encoder) // 2)), (decoder, range(len(decoder) // 2, len(decoder)))]
    for blocks, indices in token_blocks:
        for index in indices:
            blocks[index] = _Attending(blocks[index], config.hidden_size, config.chunk_size)


class NextChunk(nn.Module):
    """An objective: a latent must also predict the tokens of the next chunk."""

    def __init__(self, autoencoder: CalmAutoencoder, weight: float = 0.3) -> None:
        super().__init__()
        config = autoencoder.config
        self.weight, self.size = weight, config.hidden_size
        self.out = nn.Linear(config.latent_size, config.chunk_size * config.hidden_size)

    def loss(self, autoencoder: CalmAutoencoder, batch: Batch) -> Tensor:
        """Cross-entropy of the next chunk's tokens, each predicted on its own from the latent's mean."""
        chunk_size = autoencoder.config.chunk_size
        is_target_BC = find_targets(batch["labels"], batch["position_ids"], chunk_size)
        chunks_BCK = split_into_chunks(batch["input_ids"], chunk_size)
        mean_PZ = autoencoder.encode(chunks_BCK[:, :-1][is_target_BC]).mean
        vectors_PKD = self.out(mean_PZ).unflatten(-1, (chunk_size, self.size))
        logits = F.linear(vectors_PKD, autoencoder.encoder.embed_tokens.weight)
        return (
            self.weight
            * chunk_size
            * F.cross_entropy(logits.flatten(0, 1), chunks_BCK[:, 1:][is_target_BC].flatten())
        )


class Align(nn.Module):
    """An objective: a latent must also predict a Transformer's state after its chunk."""

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
        is_complete = (split_into_chunks(batch["labels"], chunk_size) >= 0).all(-1)
        mean_PZ = autoencoder.encode(split_into_chunks(tokens, chunk_size)[is_complete]).mean
        return self.weight * (1 - F.cosine_similarity(self.out(mean_PZ), states[is_complete], dim=-1)).mean()


def teacher_of(data: PreparedData, output: Path) -> LlamaForCausalLM:
    """A Transformer trained on the stories, which all models share."""
    recipe = recipe_of(1, {}, "demo_baseline")
    model, file = new_autoregressive_model(recipe, data), output / "weights" / "transformer.pt"
    if not file.exists():
        settings = recipe.language_model.training
        updates = _Updates(model, settings, settings.steps)
        for _, batch in zip(
            range(settings.steps), batches_of(data, recipe, "language_model", 1), strict=False
        ):
            model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
            updates.step()
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file))
    return model.requires_grad_(False).eval()
