"""What a recipe for fine-tuning says.

This file imports neither torch nor transformers: the command line reads it for its help.
"""

from dataclasses import dataclass, field
from typing import Literal

from calm.training.recipe import TrainingSettings, as_list


@dataclass(kw_only=True)
class ExampleSettings:
    """Prompts and completions.

    Args:
        sources: A .jsonl or .parquet file, a folder of them or a hub dataset, or a list of these. Records
            hold `prompt` and `completion`, or `messages`.
        validation_sources: Held-out examples; none holds out a part of the sources.
        validation_fraction: Share of examples held out.
        context: Tokens per block, a multiple of the chunk size; longer examples are shortened.
        chat_template: File of a chat template for `messages`; none takes that of the tokenizer, or a plain
            one.
    """

    sources: list[str] | str = field(default_factory=list)
    validation_sources: list[str] | str | None = None
    validation_fraction: float = 0.1
    context: int = 512
    chat_template: str | None = None

    @property
    def source_list(self) -> list[str]:
        """The sources, always as a list."""
        return as_list(self.sources)

    @property
    def validation_source_list(self) -> list[str]:
        """The held-out sources, always as a list; empty if a part of the sources is held out."""
        return as_list(self.validation_sources or [])


@dataclass(kw_only=True)
class LoraSettings:
    """Low-rank adapters; all weights but the frozen autoencoder are trained where there are none.

    Args:
        rank: Rank of the adapters; 0 for none.
        alpha: What is added is scaled by alpha / rank.
        dropout: Share of an adapter's inputs that is dropped.
        layers: Where adapters are put: linear layers of the "backbone" (of a baseline: of its decoder), of
            the "head", or of "both".
    """

    rank: int = 0
    alpha: int = 32
    dropout: float = 0.0
    layers: Literal["backbone", "head", "both"] = "both"


@dataclass(kw_only=True)
class AnswerSettings:
    """How held-out prompts are answered when the model is scored.

    Args:
        number: Held-out prompts that are answered; 0 for none.
        temperature: 0 to 1.
        num_draws: Draws of a pool at temperature 0, where a head cannot decode greedily.
    """

    number: int = 64
    temperature: float = 0.0
    num_draws: int = 32


@dataclass(kw_only=True)
class ThoughtSettings:
    """Continuous thoughts in the place of written steps (Coconut, arXiv 2412.06769; docs/thoughts.md).

    Records have `steps` beside `prompt` and `completion`. At stage k the first k of them are left out.

    Args:
        mode: What takes the place of a step that is left out: "state" (thoughts that read the last state),
            "pause" (as many pause tokens) or "drop" (nothing). "none" reads no steps at all.
        per_step: Thoughts in the place of a step.
        stages: The last stage; 0 writes all steps.
        first_stage: The first stage; the last one for no curriculum.
        steps_per_stage: Optimizer steps of each stage but the last, or a list of them; the last stage takes
            what is left.
        drop_rest: Whether another stage follows in which no step is written.
        mix: Chance that an item takes an earlier stage.
        supervised: Whether the state before a thought must also predict the step that the thought replaces
            (SIM-CoT, arXiv 2509.20317): of each step as many chunks as it has thoughts.
        reset_optimizer: Whether the optimizer forgets its moments where the stage changes.
        scale: "rms" brings a state to the root mean square of what the model reads; "none" leaves it.
        markers: The tokens before and behind thoughts; none takes those that begin and end a text.
    """

    mode: Literal["state", "pause", "drop", "none"] = "none"
    per_step: int = 1
    stages: int = 3
    first_stage: int = 0
    steps_per_stage: list[int] | int = 200
    drop_rest: bool = False
    mix: float = 0.0
    supervised: bool = False
    reset_optimizer: bool = True
    scale: Literal["none", "rms"] = "none"
    markers: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class FinetuningRecipe:
    """Everything that decides a fine-tuning run.

    Args:
        seed: Seed of all randomness.
        model: Folder or hub name of a CALM, or of an autoregressive model.
        examples: What is learned.
        lora: Adapters.
        thoughts: What the model thinks before it answers.
        training: How it is trained.
        answers: How it is scored.
        report_to: Trackers of losses and scores: any of tensorboard, wandb, mlflow and trackio.
    """

    seed: int = 0
    model: str = ""
    examples: ExampleSettings = field(default_factory=ExampleSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    thoughts: ThoughtSettings = field(default_factory=ThoughtSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    report_to: list[str] | str = field(default_factory=list)

    @property
    def tracker_list(self) -> list[str]:
        """The trackers, always as a list, each once."""
        return list(dict.fromkeys(as_list(self.report_to)))
