"""The fields of a fine-tuning recipe.

This file imports neither torch nor transformers: the command line reads it for its help.
"""

from dataclasses import dataclass, field
from typing import Literal

from calm.training.recipe import WITHOUT_EFFECT, TrainingSettings, as_list


@dataclass(kw_only=True)
class ExampleSettings:
    """Prompts and completions.

    Args:
        sources: A .jsonl or .parquet file, a folder of them or a hub dataset, or a list of these. Records
            hold `prompt` and `completion`, or `messages`.
        validation_sources: Held-out examples; none holds out a part of the sources.
        validation_fraction: Share of examples held out.
        context: Tokens per block, a multiple of the chunk size; longer examples are shortened.
        chat_template: File with a chat template for `messages`; none takes the tokenizer's, or else a plain
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
    """Low-rank adapters; without them, all weights but the frozen autoencoder are trained.

    Args:
        rank: Rank of the adapters; 0 for none.
        alpha: The output of an adapter is scaled by alpha / rank.
        dropout: Dropout rate on the inputs of the adapters.
        layers: Where adapters go: linear layers of the "backbone" (for a baseline, its decoder), of the
            "head", or of "both".
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
        temperature: Sampling temperature, 0 to 1.
        num_draws: Draws in the pool at temperature 0, for heads that cannot decode greedily.
    """

    number: int = 64
    temperature: float = 0.0
    num_draws: int = 32


@dataclass(kw_only=True)
class ThoughtSettings:
    """Continuous thoughts in place of written steps (Coconut, arXiv 2412.06769; docs/thoughts.md).

    Records have `steps` next to `prompt` and `completion`. At stage k, the first k steps are left out.

    Args:
        mode: What replaces a step that is left out: "state" (thoughts that read the last state), "pause" (as
            many pause tokens) or "drop" (nothing). "none" ignores the steps altogether.
        per_step: Thoughts that replace one step.
        stages: The last stage; 0 writes all steps.
        first_stage: The first stage; equal to `stages` for no curriculum.
        steps_per_stage: Optimizer steps of each stage but the last, or a list of them; the last stage takes
            the remaining ones.
        drop_rest: Whether to add a final stage in which no step is written.
        mix: Probability that an item is trained at an earlier stage.
        supervised: Whether the state before a thought must also predict the step that the thought replaces
            (SIM-CoT, arXiv 2509.20317): of each step, as many chunks as it has thoughts.
        reset_optimizer: Whether to reset the optimizer's moments when the stage changes.
        scale: "rms" rescales a state to the root mean square of the model's other inputs; "none" leaves it.
        markers: The tokens before and after the thoughts; none takes BOS and EOS.
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
    """Everything that defines a fine-tuning run.

    Args:
        seed: Seed of all randomness.
        model: Folder or hub name of a CALM, or of an autoregressive model.
        examples: Prompts and completions.
        lora: Low-rank adapters.
        thoughts: Continuous thoughts in place of written steps.
        training: How the model is trained.
        answers: How held-out prompts are answered.
        report_to: Trackers of losses and scores: any of tensorboard, wandb, mlflow and trackio.
    """

    seed: int = 0
    model: str = ""
    examples: ExampleSettings = field(default_factory=ExampleSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    thoughts: ThoughtSettings = field(default_factory=ThoughtSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    report_to: list[str] | str = field(default_factory=list, metadata=WITHOUT_EFFECT)

    @property
    def tracker_list(self) -> list[str]:
        """The trackers, always as a list, without duplicates."""
        return list(dict.fromkeys(as_list(self.report_to)))
