"""The data of a comparison: the results of each model, and how they were measured."""

from dataclasses import dataclass, field

from calm.data.chunking import Layout
from calm.evaluation.brier import BrierResult
from calm.evaluation.held_out import Scorecard
from calm.report.facts import Provenance


@dataclass(frozen=True)
class Checkpoint:
    """A model during training.

    Args:
        flops: FLOPs that the run had spent, on all of its stages.
        brier_lm: BrierLM on the held-out blocks scored during training; None if undefined.
        brier_1: Brier-1 on the same blocks, in percent.
        cross_entropy: Nats per token on the same blocks, if the model has a likelihood.
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
        hits: Probability of sampling the text's next n tokens, n = 1..4.
        collisions: Probability that two samples agree on the next n tokens, n = 1..4.
        draws: Mean number of draws per sampled chunk; 1 for a model with probabilities.
        flops: FLOPs per generated token, including all draws.
    """

    temperature: float
    hits: tuple[float, ...]
    collisions: tuple[float, ...]
    draws: float
    flops: float


@dataclass(frozen=True)
class ModelResult:
    """The results of one model.

    Args:
        name: Name of its run.
        chunk_size: Tokens per chunk K; 1 for a token-level model.
        head: `head_type` of a CALM; None for a token-level model.
        parameters: Total number of parameters.
        card: Held-out scores.
        training_flops: Training FLOPs of all stages of its run; None if unknown.
        seconds: Training time of the same stages; None if unknown.
        checkpoints: Cost and scores during training.
        temperature_points: Results at several temperatures, T = 1 first.
        texts: Its continuations of the prompts.
        recipe: The resolved recipe of its run as text; None for a bare model folder.
        excluded: What was trained before its run, such as its autoencoder; not part of its costs.
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
    excluded: tuple[str, ...] = ()

    def at(self, temperature: float) -> TemperaturePoint:
        """Its results at one of the temperatures."""
        return next(point for point in self.temperature_points if point.temperature == temperature)

    def flops_at(self, temperature: float) -> float:
        """FLOPs per generated token at one of the temperatures."""
        return self.at(temperature).flops


@dataclass(frozen=True)
class Comparison:
    """Models that were scored on the same text.

    Args:
        results: Results of the models.
        floors: Scores of n-gram models, by name.
        temperature: The low temperature of the continuations and of the reported costs.
        prompts: The prompts that the texts continue.
        protocol: The scoring protocol, in one line.
        provenance: When, where and with what the models were scored.
    """

    results: list[ModelResult]
    floors: dict[str, BrierResult]
    temperature: float
    prompts: list[str]
    protocol: str
    provenance: Provenance = field(default_factory=Provenance)


NATS = "cross_entropy"
"""Key of the cross-entropy in the scores of an ablation, for models with a likelihood."""


@dataclass(frozen=True)
class Outcome:
    """The results of one setting of an ablation.

    Args:
        name: Name of the setting.
        training_flops: Training FLOPs, including an autoencoder that is trained for it.
        parameters: Total number of parameters.
        published: BrierLM in the paper, if reported there.
        scores: Per seed and in percent, BrierLM (0 if undefined), its standard error over documents
            (`error`), Brier-1 to Brier-4, and the tokens that the autoencoder reconstructs; for models with a
            likelihood also their nats per token (`NATS`).
        seconds: Per seed, training time of the same stages; None if unknown.
        excluded: What was trained before; not part of its costs.
    """

    name: str
    training_flops: float
    parameters: int
    published: float | None = None
    scores: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class AblationTable:
    """The results of an ablation.

    Args:
        question: The question it answers.
        seeds: Seeds of the runs.
        context: Tokens per held-out block.
        outcomes: Results of each setting.
        recipe: The recipe that all runs share, as text.
        layout: How held-out documents are aligned to chunks.
        provenance: When, where and with what the table was made.
    """

    question: str
    seeds: list[int]
    context: int
    outcomes: list[Outcome]
    recipe: str
    layout: Layout = "documents"
    provenance: Provenance = field(default_factory=Provenance)
