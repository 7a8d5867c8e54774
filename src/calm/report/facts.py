"""What a page says of a run beside its scores: when, where and with what, and what it took."""

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
        date: When; with its time zone.
        hardware: Name of the processor, or of the accelerators.
        software: Versions by name.
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
        """What is known, date first, each in a few words."""
        versions = [f"{name} {version}" for name, version in self.software.items()]
        return [*filter(None, (self.day, self.hardware)), *versions]


def here_and_now(num_devices: int = 1) -> Provenance:
    """The provenance of what is computed by this process, or by several that have a device each."""
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
    """What one stage of training took.

    Args:
        name: Of the stage, in the history of a run.
        steps: Optimizer steps.
        tokens: Tokens of all steps.
        flops: Training FLOPs; None if they are not known.
        seconds: Time, held-out evaluations included; None if it is not known.
    """

    name: str
    steps: int
    tokens: int
    flops: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run.

    Args:
        model: What the model is, such as "CALM, K = 4, energy head".
        parameters: Parameters by part.
        stages: What its stages took, in their order; those that were trained.
        has_trained_autoencoder: Whether there is one, here or elsewhere; fixed codes lose nothing.
        provenance: When, where and with what it was trained; empty where nothing is known.
        teacher: Whom the language model learned from, in words; None for the text alone.
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
        """Tokens of the language model's training."""
        return sum(stage.tokens for stage in self.stages if stage.name == LANGUAGE_MODEL)

    @property
    def flops(self) -> float | None:
        """FLOPs of all stages, if they are known."""
        known = [stage.flops for stage in self.stages if stage.flops is not None]
        return sum(known) if known and len(known) == len(self.stages) else None

    @property
    def seconds(self) -> float | None:
        """Seconds of all stages, if they are known."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if known and len(known) == len(self.stages) else None
