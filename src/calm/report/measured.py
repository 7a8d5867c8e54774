"""What a comparison holds: what is known of each model, and how it was measured."""

from dataclasses import dataclass, field

from calm.evaluation.brier import BrierResult
from calm.evaluation.held_out import Scorecard
from calm.report.facts import Provenance


@dataclass(frozen=True)
class Checkpoint:
    """A model on its way.

    Args:
        flops: FLOPs spent so far, those of the autoencoder included.
        brier_lm: Its BrierLM on the held-out blocks that are scored during training; None where undefined.
        brier_1: Its Brier-1 there, in percent.
        cross_entropy: Nats per token on the same blocks, where the model has probabilities.
    """

    flops: float
    brier_lm: float | None
    brier_1: float
    cross_entropy: float | None = None


@dataclass(frozen=True)
class TemperaturePoint:
    """A model at one temperature.

    Args:
        temperature: T.
        hits: Probability to draw the text's own next 1..4 tokens.
        collisions: Probability that two samples agree in their next 1..4 tokens.
        draws: Draws that one sample of a chunk takes in the mean; 1 for a model with probabilities.
        flops: FLOPs per token that is written, draws included.
    """

    temperature: float
    hits: tuple[float, ...]
    collisions: tuple[float, ...]
    draws: float
    flops: float


@dataclass(frozen=True)
class ModelResult:
    """What is known of one model.

    Args:
        name: Of its run.
        chunk_size: Tokens per chunk K; 1 for a model of tokens.
        head: `head_type` of a CALM; None for a model of tokens.
        parameters: Of all parts.
        card: Held-out figures.
        training_flops: FLOPs of its training, autoencoder included; None if it is not known.
        seconds: Time its training took; None if it is not known.
        checkpoints: Where it stood during training.
        temperature_points: At several temperatures, T = 1 first.
        texts: How it continues the prompts.
        recipe: The resolved recipe of its run as text; None for a mere model folder.
    """

    name: str
    chunk_size: int
    head: str | None
    parameters: int
    card: Scorecard
    training_flops: float | None
    seconds: float | None
    checkpoints: list[Checkpoint]
    temperature_points: list[TemperaturePoint]
    texts: list[str]
    recipe: str | None = None

    def at(self, temperature: float) -> TemperaturePoint:
        """Its figures at one of the temperatures."""
        return next(point for point in self.temperature_points if point.temperature == temperature)

    def flops_at(self, temperature: float) -> float:
        """FLOPs per token that is written at one of the temperatures."""
        return self.at(temperature).flops


@dataclass(frozen=True)
class Comparison:
    """Models that were scored on the same text.

    Args:
        results: The models.
        floors: N-gram models.
        temperature: The low temperature at which texts were written and costs are shown.
        prompts: What the texts continue.
        protocol: One line that says how it was scored.
        provenance: When, where and with what it was scored.
    """

    results: list[ModelResult]
    floors: dict[str, BrierResult]
    temperature: float
    prompts: list[str]
    protocol: str
    provenance: Provenance = field(default_factory=Provenance)


NATS = "cross_entropy"
"""The figure of a likelihood, in the scores of an ablation."""


@dataclass(frozen=True)
class Outcome:
    """What came of one of the settings that an ablation compares.

    Args:
        name: Of the setting.
        training_flops: FLOPs of its training, autoencoder included.
        parameters: Of all parts.
        published: BrierLM in the paper, if it is there.
        scores: For each seed BrierLM (0 if undefined), its standard error over documents (`error`), Brier-1
            to Brier-4 in percent, the share of tokens that the autoencoder reconstructs, and for models with
            a likelihood their nats a token (`NATS`).
        seconds: For each seed the time its training took, autoencoder included; None if it is not known.
    """

    name: str
    training_flops: float
    parameters: int
    published: float | None = None
    scores: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class AblationTable:
    """An ablation as it was run.

    Args:
        question: What was asked.
        seeds: Seeds of the runs.
        context: Tokens of a held-out block.
        outcomes: One for each setting.
        recipe: What is common to all runs, as text.
        provenance: When, where and with what it was put together.
    """

    question: str
    seeds: list[int]
    context: int
    outcomes: list[Outcome]
    recipe: str
    provenance: Provenance = field(default_factory=Provenance)
