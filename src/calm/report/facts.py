"""What a page says about a run besides its scores: when, where and with what it was trained, and its cost."""

import datetime
from dataclasses import dataclass, field

import torch
import transformers

import calm
from calm.hardware import device_name

AUTOENCODER, LANGUAGE_MODEL = "autoencoder", "language_model"


@dataclass(frozen=True)
class Provenance:
    """When, where and with what something was computed.

    Args:
        date: Date and time, with time zone.
        hardware: Name of the CPU or of the accelerators.
        software: Versions by package name.
    """

    date: datetime.datetime | None = None
    hardware: str | None = None
    software: dict[str, str] = field(default_factory=dict)

    @property
    def day(self) -> str | None:
        """The date in words: 9 July 2026."""
        return f"{self.date.day} {self.date:%B %Y}" if self.date else None

    @property
    def words(self) -> list[str]:
        """The known facts, date first, as short phrases."""
        versions = [f"{name} {version}" for name, version in self.software.items()]
        return [*filter(None, (self.day, self.hardware)), *versions]


def here_and_now(num_devices: int = 1) -> Provenance:
    """The provenance of what this process computes now, or of several processes with a device each."""
    return Provenance(
        date=datetime.datetime.now().astimezone(),
        hardware=f"{num_devices} x {device_name()}" if num_devices > 1 else device_name(),
        software={
            "calm": calm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


@dataclass(frozen=True)
class StageFacts:
    """The cost of one stage of training.

    Args:
        name: Name of the stage in the history of a run.
        steps: Optimizer steps.
        tokens: Tokens over all steps.
        flops: Training FLOPs; None if unknown.
        seconds: Time, including held-out evaluations; None if unknown.
    """

    name: str
    steps: int
    tokens: int
    flops: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class RunFacts:
    """What is known about a run.

    Args:
        model: Description of the model, such as "CALM, K = 4, energy head".
        parameters: Number of parameters by part.
        stages: Costs of the stages that were trained, in order.
        has_trained_autoencoder: Whether it has a trained autoencoder, from this run or another, rather than
            fixed codes, which are lossless.
        provenance: When, where and with what it was trained; empty if unknown.
        teacher: Description of the teacher the language model was distilled from; None without one.
        has_loss_in_nats: Whether the loss of a language model with a perplexity is its cross-entropy.
    """

    model: str
    parameters: dict[str, int]
    stages: list[StageFacts]
    has_trained_autoencoder: bool
    provenance: Provenance = field(default_factory=Provenance)
    teacher: str | None = None
    has_loss_in_nats: bool = True

    @property
    def tokens(self) -> int:
        """Training tokens of the language model."""
        return sum(stage.tokens for stage in self.stages if stage.name == LANGUAGE_MODEL)

    @property
    def flops(self) -> float | None:
        """FLOPs of all stages, if all are known."""
        known = [stage.flops for stage in self.stages if stage.flops is not None]
        return sum(known) if known and len(known) == len(self.stages) else None

    @property
    def seconds(self) -> float | None:
        """Seconds of all stages, if all are known."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if known and len(known) == len(self.stages) else None
