"""The curriculum for continuous thoughts: at stage k, the first k steps of every answer are left out.

This file imports neither torch nor transformers.
"""

import random
from dataclasses import dataclass
from itertools import accumulate

from calm.errors import InputError
from calm.training.finetuning_recipe import ThoughtSettings

_ALL = 1 << 30  # More steps than any answer has.


@dataclass(frozen=True)
class ThoughtStage:
    """How many steps of an answer are left out, and how many thoughts replace them.

    Args:
        number: Number of the stage.
        left_out: How many of the first steps are left out.
        thoughts: Number of thoughts in their place.
    """

    number: int
    left_out: int
    thoughts: int


@dataclass(frozen=True)
class Curriculum:
    """The schedule of stages.

    Args:
        stages: The stages, in order.
        starts: The optimizer step at which each starts, the first at 0.
        mix: Probability that an item is trained at an earlier stage.
    """

    stages: tuple[ThoughtStage, ...]
    starts: tuple[int, ...]
    mix: float = 0.0

    @classmethod
    def of(cls, settings: ThoughtSettings, total_steps: int) -> "Curriculum":
        """The curriculum of a recipe.

        Args:
            settings: The recipe's section.
            total_steps: Optimizer steps of the whole run; the last stage takes those that the others leave.

        Raises:
            InputError: If the stages do not fit in these steps, or settings contradict each other.
        """
        if settings.first_stage > settings.stages:
            raise InputError(
                f"thoughts.first_stage must be at most thoughts.stages, {settings.stages}, "
                f"got {settings.first_stage}."
            )
        stages = [_stage(settings, number) for number in range(settings.first_stage, settings.stages + 1)]
        if settings.drop_rest:
            stages.append(ThoughtStage(settings.stages + 1, _ALL, stages[-1].thoughts))
        lengths = settings.steps_per_stage
        if isinstance(lengths, int):
            lengths = [lengths] * (len(stages) - 1)
        if len(lengths) != len(stages) - 1 or any(length < 1 for length in lengths):
            raise InputError(
                f"thoughts.steps_per_stage must list the steps of {len(stages) - 1} stages (all but the "
                f"last), each at least 1, got {settings.steps_per_stage}."
            )
        starts = tuple(accumulate(lengths, initial=0))
        if starts[-1] >= total_steps:
            raise InputError(
                f"the last stage would begin at step {starts[-1]} of {total_steps}: set training.steps "
                "higher, or thoughts.steps_per_stage lower."
            )
        return cls(tuple(stages), starts, settings.mix)

    def at(self, step: int) -> ThoughtStage:
        """The stage of an optimizer step, counted from 0."""
        return self.stages[sum(start <= step for start in self.starts) - 1]

    def begins_at(self, step: int) -> bool:
        """Whether the stage changes at this step."""
        return step in self.starts[1:]

    def of_item(self, step: int, seed: int, index: int) -> ThoughtStage:
        """The stage of an item: that of its step or, with probability `mix`, a random earlier one.

        Args:
            step: The optimizer step.
            seed: Seed of the run.
            index: Index of the item in the step.
        """
        stage = self.at(step)
        earlier = self.stages[: self.stages.index(stage)]
        if not self.mix or not earlier:
            return stage
        rng = random.Random(f"{seed}/{step}/{index}")
        return rng.choice(earlier) if rng.random() < self.mix else stage


def _stage(settings: ThoughtSettings, number: int) -> ThoughtStage:
    return ThoughtStage(number, number, 0 if settings.mode == "drop" else number * settings.per_step)
