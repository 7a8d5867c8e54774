"""Training with continuous thoughts: rows for each stage, and what changes in model and optimizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from calm.data.examples import Example
from calm.data.reasoning import RowLayout, ThinkingRow
from calm.errors import InputError
from calm.models.context import longest_context
from calm.models.language_model import language_model
from calm.models.thoughts import THOUGHT, Thoughts
from calm.training.batches import NUMBERS, ChunkNetwork
from calm.training.curriculum import Curriculum, ThoughtStage
from calm.training.finetuning_recipe import FinetuningRecipe, ThoughtSettings
from calm.training.noise import number_of_block

_SCORING_BATCH = 16


@dataclass
class ThoughtTraining:
    """How a run trains a model to think.

    Args:
        curriculum: Which steps are left out when.
        layout: How rows are laid out.
        thoughts: What replaces the steps; None for nothing.
        has_noise: Whether the loss takes noise, which is drawn for each row.
        stage: The current stage.
        labels_per_step: Thoughts per step that are supervised with that step; 0 for none.
    """

    curriculum: Curriculum
    layout: RowLayout
    thoughts: Thoughts | None
    has_noise: bool
    stage: ThoughtStage
    labels_per_step: int = 0

    def row(self, example: Example, stage: ThoughtStage) -> ThinkingRow:
        """The row of an example at a stage."""
        between = self._tokens_between(stage)
        per_step = self.labels_per_step
        labels = self.layout.step_labels(example, between, per_step) if per_step else []
        return self.layout.row(example, stage.left_out, between, labels)

    def _tokens_between(self, stage: ThoughtStage) -> list[int]:
        """Tokens of the markers and thoughts between question and answer."""
        return [] if self.thoughts is None else self.thoughts.tokens(self.layout.chunk_size, stage.thoughts)

    def collate(self, rows: Sequence[ThinkingRow]) -> dict[str, Any]:
        """Collate a batch, with the numbers that seed its noise if the loss takes any."""
        batch: dict[str, Any] = self.layout.batch(rows)
        if not batch["is_thought"].any():
            del batch["is_thought"]  # A single pass is enough.
        if self.has_noise:
            numbers = [number_of_block(torch.tensor([*row.before, *row.after])) for row in rows]
            batch[NUMBERS] = torch.tensor(numbers)
        return batch

    def enter_stage(self, model: PreTrainedModel, stage: ThoughtStage) -> None:
        """Switch to a stage, and record its number of thoughts in the model's configuration."""
        self.stage = stage
        model.config.thoughts = (
            None if self.thoughts is None else replace(self.thoughts, number=stage.thoughts).as_dict()
        )

    def longest_answer(self, examples: Sequence[Example]) -> int:
        """Tokens of the longest answer that is to be generated at this stage."""
        return max((self.layout.num_written(example, self.stage.left_out) for example in examples), default=0)

    def num_shortened(self, examples: Sequence[Example]) -> int:
        """How many prompts are too long for the context at some stage.

        Raises:
            InputError: If there is no room for a prompt at all.
        """
        between = {stage: len(self._tokens_between(stage)) for stage in self.curriculum.stages}
        shortened = 0
        for example in examples:
            try:
                rooms = [
                    self.layout.room(self.layout.num_written(example, stage.left_out), length)
                    for stage, length in between.items()
                ]
            except InputError as error:
                raise InputError(f"{example.where}: {error}") from None
            shortened += min(rooms) < len(example.prompt)
        return shortened

    @torch.no_grad()
    def loss(self, model: PreTrainedModel, examples: Sequence[Example]) -> float:
        """Mean loss over the targets of examples at the current stage, with the same noise each time."""
        view, total, count = language_model(model), 0.0, 0
        generator = torch.Generator(model.device).manual_seed(0)
        network: Any = model
        for first in range(0, len(examples), _SCORING_BATCH):
            rows = [self.row(example, self.stage) for example in examples[first : first + _SCORING_BATCH]]
            batch = self.collate(rows)
            batch.pop(NUMBERS, None)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            noise = {"generator": generator} if self.has_noise else {}
            targets = int(view.count_targets(batch["labels"], batch["position_ids"]))
            total, count = total + float(network(**batch, **noise).loss) * targets, count + targets
        return total / max(1, count)


def thinking_of(
    recipe: FinetuningRecipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> ThoughtTraining | None:
    """How a recipe trains a model to think; None if it does not.

    Raises:
        InputError: If the model does not support thoughts, or settings contradict each other.
    """
    settings = recipe.thoughts
    if settings.mode == "none":
        return None
    view = language_model(model)
    if not view.can_think:
        raise InputError(
            f"thoughts work only with CALM and Llama models, not with a {type(model).__name__}; set "
            "thoughts.mode to none."
        )
    context, longest = recipe.examples.context, longest_context(model.config)
    if longest is not None and context > longest:
        raise InputError(
            f"examples.context is {context}, but the model's context is {longest} tokens; set it lower."
        )
    layout = RowLayout(view.chunk_size, context, tokenizer.pad_token_id, THOUGHT)
    thoughts = None if settings.mode == "drop" else _thoughts(settings, model, tokenizer)
    curriculum = Curriculum.of(settings, recipe.training.steps)
    labels = settings.per_step if settings.supervised and thoughts is not None else 0
    return ThoughtTraining(
        curriculum, layout, thoughts, isinstance(model, ChunkNetwork), curriculum.at(0), labels
    )


def _thoughts(
    settings: ThoughtSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Thoughts:
    """The markers and thoughts of a recipe, with no thoughts yet: a stage sets their number.

    Raises:
        InputError: If the markers are not two tokens of the tokenizer.
    """
    if settings.markers:
        vocabulary = tokenizer.get_vocab()
        ids = [vocabulary[marker] for marker in settings.markers if marker in vocabulary]
        if len(ids) != 2 or len(settings.markers) != 2:
            raise InputError(
                f"thoughts.markers must be two tokens of the tokenizer, got {', '.join(settings.markers)}."
            )
        begin, end = ids
    else:
        end = tokenizer.eos_token_id
        begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    scale = language_model(model).input_rms if settings.scale == "rms" and settings.mode == "state" else None
    return Thoughts(0, begin, end, "pause" if settings.mode == "pause" else "state", scale)


class ThinkingRows(Dataset):
    """The rows of a whole run, in order; each depends only on its index and the seed.

    So a resumed run continues with the same rows, however many processes load them.

    Args:
        thinking: How rows are made.
        examples: The examples; each is seen once before any is repeated.
        rows_per_step: Rows per optimizer step.
        steps: Optimizer steps.
        seed: Seed of the run.
    """

    def __init__(
        self,
        thinking: ThoughtTraining,
        examples: Sequence[Example],
        rows_per_step: int,
        steps: int,
        seed: int,
    ) -> None:
        self._thinking, self._examples, self._seed = thinking, examples, seed
        self._per_step, self._steps = rows_per_step, steps
        self._epoch, self._order = -1, np.arange(0)

    def __len__(self) -> int:
        return self._per_step * self._steps

    def __getitem__(self, index: int) -> ThinkingRow:
        epoch, position = divmod(index, len(self._examples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        example = self._examples[int(self._order[position])]
        step, index_in_step = divmod(index, self._per_step)
        return self._thinking.row(example, self._thinking.curriculum.of_item(step, self._seed, index_in_step))

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._examples))


class StageChange(TrainerCallback):
    """Updates a model and its optimizer when a stage of the curriculum starts.

    Args:
        thinking: How the run trains.
        model: The network.
        new_optimizer: Builds an optimizer like the run's, which is then reset to the state of the new one;
            None to keep its state.
    """

    def __init__(
        self,
        thinking: ThoughtTraining,
        model: PreTrainedModel,
        new_optimizer: Callable[[], torch.optim.Optimizer] | None,
    ) -> None:
        self._thinking, self._model, self._new_optimizer = thinking, model, new_optimizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Enter the stage of the last step taken, where a resumed run still is."""
        self._thinking.enter_stage(self._model, self._thinking.curriculum.at(max(0, state.global_step - 1)))

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Change stage as a step starts, so a run resumed from the end of a stage changes it as well."""
        step, curriculum = state.global_step, self._thinking.curriculum
        self._thinking.enter_stage(self._model, curriculum.at(step))
        if self._new_optimizer is not None and curriculum.begins_at(step):
            reset_optimizer(optimizer, self._new_optimizer())


def reset_optimizer(optimizer: Any, new: torch.optim.Optimizer) -> None:
    """Reset everything in an optimizer except its learning rates.

    Args:
        optimizer: The optimizer.
        new: One like it that has not taken a step. Both its state and its groups are copied, since an
            optimizer may keep its moments and counters in either.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it.
    names = ("lr", "initial_lr")
    rates = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
    optimizer.state.clear()
    optimizer.load_state_dict(new.state_dict())
    for group, group_rates in zip(optimizer.param_groups, rates, strict=True):
        group.update(group_rates)
