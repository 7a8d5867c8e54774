"""Recipe and devices -> a plan: does it fit, how long does it take, and how much energy?"""

from dataclasses import asdict, dataclass
from typing import Any

from calm.planning.devices import Devices
from calm.planning.memory import Footprint, Parts, Sharing, largest_that_fits
from calm.planning.pace import Pace, SpeedAssumptions, pace_of
from calm.planning.serving import Serving, serving_of
from calm.planning.stages import PlannedStage, stages_of
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.recipe import Recipe


@dataclass(frozen=True)
class SharingPlan:
    """One way to share a stage among devices: whether it fits, and what it costs.

    Args:
        parts: Bytes per device by part, with the recipe's microbatch.
        fits: Whether a device has that much usable memory.
        largest: Tokens of the largest microbatch that fits, up to a device's share of a step; 0 if not even
            one block fits.
        largest_checkpointed: The same with gradient checkpointing; None if the network does not support it.
        pace: Time and energy.
    """

    parts: Parts
    fits: bool
    largest: int
    largest_checkpointed: int | None
    pace: Pace


@dataclass(frozen=True)
class StagePlan:
    """What a stage costs.

    Args:
        name: What is trained.
        parameters: Number of trained parameters.
        microbatch: Tokens per device and pass.
        passes: Microbatches per step on each device.
        precision: "fp32" or "bf16".
        is_checkpointed: Whether activations are recomputed in the backward pass.
        sharing: How the recipe shares the stage among devices.
        options: The plan for each possible way to share it.
    """

    name: str
    parameters: int
    microbatch: int
    passes: int
    precision: str
    is_checkpointed: bool
    sharing: Sharing
    options: dict[Sharing, SharingPlan]

    @property
    def pace(self) -> Pace:
        """Time and energy when shared as in the recipe."""
        return self.options[self.sharing].pace


@dataclass(frozen=True)
class Plan:
    """What a recipe costs.

    Args:
        devices: The devices.
        speed: Assumptions about them.
        stages: The plan of each stage.
        serving: How fast one card could serve the model.
    """

    devices: Devices
    speed: SpeedAssumptions
    stages: list[StagePlan]
    serving: Serving

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(stage.pace.total_seconds for stage in self.stages)

    @property
    def kilowatt_hours(self) -> float:
        """Energy of all stages."""
        return sum(stage.pace.kilowatt_hours for stage in self.stages)

    def as_figures(self) -> dict[str, Any]:
        """All figures for programs, in bytes, seconds, tokens and FLOPs."""
        return {
            "devices": self.devices.count,
            "card": {**asdict(self.devices.device), "usable": self.devices.device.usable},
            "assumed": asdict(self.speed),
            "stages": {stage.name: _figures_of(stage) for stage in self.stages},
            "seconds": self.seconds,
            "kilowatt_hours": self.kilowatt_hours,
            "serving": {
                **{name: value for name, value in asdict(self.serving).items() if name != "rates"},
                "rates": [
                    {**asdict(rate), "bound": rate.bound, "tokens_per_second": rate.tokens_per_second}
                    for rate in self.serving.rates
                ],
            },
        }


def _figures_of(stage: StagePlan) -> dict[str, Any]:
    return {
        "parameters": stage.parameters,
        "steps": stage.pace.steps,
        "step_tokens": stage.pace.step_tokens,
        "flops": stage.pace.steps * stage.pace.flops,
        "microbatch_tokens": stage.microbatch,
        "passes": stage.passes,
        "precision": stage.precision,
        "gradient_checkpointing": stage.is_checkpointed,
        "sharing": stage.sharing,
        "ways": {name: _figures_of_option(option) for name, option in stage.options.items()},
    }


def _figures_of_option(option: SharingPlan) -> dict[str, Any]:
    pace = option.pace
    return {
        "memory": {**option.parts, "all": sum(option.parts.values())},
        "fits": option.fits,
        "largest_microbatch": option.largest,
        "largest_microbatch_with_checkpointing": option.largest_checkpointed,
        "seconds_of_step": {**pace.seconds, "all": pace.step_seconds},
        "bound": pace.bound,
        "bytes_sent_in_step": pace.sent,
        "tokens_per_second": pace.tokens_per_second,
        "seconds": pace.total_seconds,
        "kilowatt_hours": pace.kilowatt_hours,
    }


def make_plan(
    recipe: Recipe | FinetuningRecipe,
    devices: Devices,
    speed: SpeedAssumptions,
    vocab_size: int | None = None,
) -> Plan:
    """Plan a recipe.

    Args:
        recipe: The recipe.
        devices: The devices.
        speed: Assumptions about them.
        vocab_size: Vocabulary size, if the recipe's tokenizer is not available here.

    Raises:
        InputError: If the recipe is invalid or cannot be planned.
    """
    stages = stages_of(recipe, devices.count, vocab_size)
    planned = [_plan_stage(stage, devices, speed) for stage in stages]
    return Plan(devices, speed, planned, serving_of(stages[-1].config, devices.device))


def _plan_stage(stage: PlannedStage, devices: Devices, speed: SpeedAssumptions) -> StagePlan:
    count, settings, footprint = devices.count, stage.settings, Footprint(stage)
    blocks, passes = settings.batches(stage.context, count)
    sharing: Sharing = "one process" if count == 1 else "FSDP" if stage.is_sharded else "DDP"
    return StagePlan(
        name=stage.name,
        parameters=sum(weight.numel() for weight in footprint.trained),
        microbatch=blocks * stage.context,
        passes=passes,
        precision=settings.precision,
        is_checkpointed=settings.gradient_checkpointing,
        sharing=sharing,
        options={name: _plan_sharing(footprint, name, devices, speed) for name in _sharings(stage, count)},
    )


def _sharings(stage: PlannedStage, count: int) -> list[Sharing]:
    """The possible ways to share a stage among devices."""
    if count == 1:
        return ["one process"]
    return ["DDP", "FSDP"] if stage.can_be_sharded else ["DDP"]


def _plan_sharing(
    footprint: Footprint, sharing: Sharing, devices: Devices, speed: SpeedAssumptions
) -> SharingPlan:
    stage, usable = footprint.stage, devices.device.usable
    blocks, passes = stage.settings.batches(stage.context, devices.count)
    share = blocks * passes

    def parts_of(microbatch: int, checkpointing: bool | None = None) -> Parts:
        return footprint.parts(
            microbatch,
            sharing=sharing,
            devices=devices.count,
            is_summed=microbatch < share,
            checkpointing=checkpointing,
        )

    def largest(checkpointing: bool | None = None) -> int:
        def bytes_for(microbatch: int) -> int:
            return sum(parts_of(microbatch, checkpointing).values())

        return stage.context * largest_that_fits(bytes_for, usable, share)

    parts = parts_of(blocks)
    return SharingPlan(
        parts,
        fits=sum(parts.values()) <= usable,
        largest=largest(),
        largest_checkpointed=largest(True) if stage.network.supports_gradient_checkpointing else None,
        pace=pace_of(footprint, sharing, devices, speed),
    )
