"""Ranges of the numbers in recipes, checked before any work is done."""

import dataclasses
from typing import Any

from calm.models.hyperparameters import (
    AUTOENCODER_RANGES,
    DECODER_RANGES,
    INPUT_RANGES,
    SHARES_BELOW_ONE,
    TOKEN_LAYERS,
)
from calm.ranges import DOCUMENT_MB, Range
from calm.training.finetuning_recipe import (
    AnswerSettings,
    ExampleSettings,
    FinetuningRecipe,
    LoraSettings,
    ThoughtSettings,
)
from calm.training.recipe import (
    AutoencoderSettings,
    DataSettings,
    LanguageModelSettings,
    OptimizerSettings,
    Recipe,
    TeacherSettings,
    TrainingSettings,
    UptrainingSettings,
)

_COUNT = Range(0, 10**12)
_POSITIVE_COUNT = Range(1, 10**12)
_PROCESSES = Range(0, 4096)
_RATE = Range(0)
_SHARE = Range(0, 1)
_PART = Range(0, 1, includes_low=False, includes_high=False)
_STAGES = Range(0, 1000)
_SEED = Range(0, 2**32 - 1)
# Every number in every group of settings; ranges shared with model configurations are in models/.
RANGES: dict[type, dict[str, Range]] = {
    DataSettings: {
        "validation_fraction": _PART,
        "max_document_mb": DOCUMENT_MB,
        "vocab_size": Range(1, 10**7),
        "context": Range(1, 10**9),
        "num_proc": Range(1, 4096),
        "sample_documents": _POSITIVE_COUNT,
        "window_documents": _POSITIVE_COUNT,
    },
    OptimizerSettings: {
        "learning_rate": _RATE,
        "adamw_learning_rate": _RATE,
        "weight_decay": _RATE,
        "beta1": SHARES_BELOW_ONE,
        "beta2": SHARES_BELOW_ONE,
        "epsilon": _RATE,
        "momentum": SHARES_BELOW_ONE,
        "newton_schulz_steps": Range(1, 100),
        "warmup_steps": _COUNT,
        "decay_fraction": _SHARE,
        "max_grad_norm": _RATE,
        "source_rate": _RATE,
    },
    TrainingSettings: {
        "steps": _POSITIVE_COUNT,
        "batch_tokens": _POSITIVE_COUNT,
        "microbatch_tokens": _POSITIVE_COUNT,
        "log_every": _POSITIVE_COUNT,
        "evaluate_every": _COUNT,
        "evaluation_blocks": _POSITIVE_COUNT,
        "save_every": _COUNT,
        "keep_checkpoints": _POSITIVE_COUNT,
        "num_workers": _PROCESSES,
    },
    AutoencoderSettings: AUTOENCODER_RANGES,
    LanguageModelSettings: DECODER_RANGES | INPUT_RANGES,
    UptrainingSettings: {"first_layers": TOKEN_LAYERS, "last_layers": TOKEN_LAYERS},
    TeacherSettings: {"weight": _SHARE, "temperature": Range(0.01, 1000), "states": _RATE},
    Recipe: {"seed": _SEED, "chunk_size": Range(1, 1024)},
    ExampleSettings: {"validation_fraction": _PART, "context": Range(1, 10**9)},
    LoraSettings: {"rank": Range(0, 10**6), "alpha": Range(1, 10**9), "dropout": SHARES_BELOW_ONE},
    ThoughtSettings: {
        "per_step": Range(1, 1000),
        "stages": _STAGES,
        "first_stage": _STAGES,
        "steps_per_stage": _POSITIVE_COUNT,
        "mix": _SHARE,
    },
    AnswerSettings: {"number": _COUNT, "temperature": _SHARE, "num_draws": Range(1, 10**6)},
    FinetuningRecipe: {"seed": _SEED},
}


def check_ranges(settings: Any, prefix: str = "") -> None:
    """Raise InputError for the first number in some settings, or in groups of them, that is out of range.

    Args:
        settings: A recipe or a group of its settings.
        prefix: Dotted name of the group, with a dot at the end.
    """
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            RANGES[type(settings)][field.name].require(name, value)
