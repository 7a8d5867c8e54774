"""Time and energy of a stage, and what bounds its speed."""

from dataclasses import dataclass

from calm.flops import teaching_flops, training_flops
from calm.planning.devices import Devices
from calm.planning.memory import Footprint, Sharing, bytes_of

COMPUTE, COMMUNICATION, OPTIMIZER = "compute", "communication", "optimizer"


@dataclass(frozen=True)
class SpeedAssumptions:
    """Assumptions about the machine.

    Args:
        utilisation: Share of a card's FLOP/s that training reaches.
        link: Bytes per second that a device can send and receive.
    """

    utilisation: float
    link: float


@dataclass(frozen=True)
class Pace:
    """The cost of a stage's steps.

    Args:
        flops: FLOPs of a step on all devices, as `calm.flops` counts them.
        sent: Bytes that a device sends in a step.
        seconds: Seconds per step of "compute", of "communication", which overlaps with it, and of
            "optimizer", which does not.
        step_tokens: Tokens of a step on all devices.
        steps: Number of steps.
        watts: Power of all cards.
    """

    flops: float
    sent: float
    seconds: dict[str, float]
    step_tokens: int
    steps: int
    watts: float

    @property
    def step_seconds(self) -> float:
        """Seconds of a step: compute and communication overlap, and the longer of the two counts."""
        return max(self.seconds[COMPUTE], self.seconds[COMMUNICATION]) + self.seconds[OPTIMIZER]

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def total_seconds(self) -> float:
        """Seconds of all steps."""
        return self.steps * self.step_seconds

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second on all devices; data loading must keep up with it."""
        return self.step_tokens / self.step_seconds

    @property
    def kilowatt_hours(self) -> float:
        """Energy of the cards at full power, in kWh, without hosts and cooling."""
        return self.watts * self.total_seconds / 3.6e6


def pace_of(footprint: Footprint, sharing: Sharing, devices: Devices, speed: SpeedAssumptions) -> Pace:
    """The cost of a stage's steps.

    Args:
        footprint: Its memory footprint, which knows weights, FSDP groups and optimizer.
        sharing: How the devices share it.
        devices: The devices.
        speed: Assumptions about them.

    Raises:
        InputError: If its FLOPs are not known.
    """
    stage, count, card = footprint.stage, devices.count, devices.device
    settings = stage.settings
    tokens = settings.batch_tokens
    flops = training_flops(stage.config, stage.context) * tokens
    # Training counts as three forward passes; checkpointing recomputes one more.
    computed = flops * (4 / 3 if settings.gradient_checkpointing else 1)
    if stage.teacher is not None:
        teacher_flops = teaching_flops(stage.teacher.network.config, stage.context) * tokens
        flops, computed = flops + teacher_flops, computed + teacher_flops
    rate = card.flops(settings.precision) * speed.utilisation
    _, passes = settings.batches(stage.context, count)
    sent = bytes_sent(footprint, sharing, count, passes)
    shares = count if sharing == "FSDP" else 1
    # Weights and state are read and written, gradients are read.
    state = sum(tensor.nbytes for tensor, _ in footprint.update.state)
    moved = (3 * bytes_of(footprint.trained) + 2 * state) / shares
    return Pace(
        flops=flops,
        sent=sent,
        seconds={
            COMPUTE: computed / (count * rate),
            COMMUNICATION: sent / speed.link,
            # Every process computes the updates of all matrices, sharded or not.
            OPTIMIZER: moved / card.bandwidth + footprint.update.flops / rate,
        },
        step_tokens=tokens,
        steps=settings.steps,
        watts=count * card.watts,
    )


def bytes_sent(footprint: Footprint, sharing: Sharing, devices: int, passes: int) -> float:
    """Bytes that a device sends in an optimizer step with ring algorithms.

    DDP all-reduces gradients (twice their bytes, times (devices - 1)/devices). FSDP all-gathers weights for
    each microbatch, layers and embedding again for the backward pass, and reduce-scatters gradients once per
    step; Muon gathers its updates as well.

    Args:
        footprint: Weights and FSDP groups.
        sharing: How the devices share the stage.
        devices: Number of devices.
        passes: Microbatches per step.
    """
    share, gradients = (devices - 1) / devices, bytes_of(footprint.trained)
    if sharing != "FSDP":
        return 2 * share * gradients
    groups = footprint.groups
    gathered_twice = sum(map(bytes_of, groups.layers)) + bytes_of(groups.embedding)
    gathered = passes * (bytes_of(groups.root) + 2 * gathered_twice)
    return share * (gathered + gradients + footprint.update.matrix_bytes)
