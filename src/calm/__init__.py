"""CALM: language models that predict one vector for several tokens (arXiv 2510.27688).

`import calm` makes the models known to the Auto classes of transformers. Only in the process of the
`calm` command it does not, because that imports torch, and `calm --help` should answer at once; there
`calm.models.loading` does it, which opens models.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calm.core.brier import brier_lm, brier_scores
    from calm.core.energy import energy_loss
    from calm.core.gaussian import DiagonalGaussian
    from calm.core.temperature import TemperatureSettings, sample_exact, sample_from_pool
    from calm.models.autoencoder import CalmAutoencoder
    from calm.models.calm import CalmForCausalLM
    from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
    from calm.models.heads import GenerativeHead, HeadConfig, register_head
    from calm.training.optimizers import register_optimizer

__version__ = "0.1.0"

_HOMES = {
    "CalmAutoencoder": "calm.models.autoencoder",
    "CalmAutoencoderConfig": "calm.models.configuration",
    "CalmConfig": "calm.models.configuration",
    "CalmForCausalLM": "calm.models.calm",
    "DiagonalGaussian": "calm.core.gaussian",
    "GenerativeHead": "calm.models.heads",
    "HeadConfig": "calm.models.heads",
    "brier_lm": "calm.core.brier",
    "brier_scores": "calm.core.brier",
    "energy_loss": "calm.core.energy",
    "register_head": "calm.models.heads",
    "register_optimizer": "calm.training.optimizers",
    "TemperatureSettings": "calm.core.temperature",
    "sample_exact": "calm.core.temperature",
    "sample_from_pool": "calm.core.temperature",
}

# Spelled out, for type checkers.
__all__ = [
    "CalmAutoencoder",
    "CalmAutoencoderConfig",
    "CalmConfig",
    "CalmForCausalLM",
    "DiagonalGaussian",
    "GenerativeHead",
    "HeadConfig",
    "TemperatureSettings",
    "__version__",
    "brier_lm",
    "brier_scores",
    "energy_loss",
    "register_head",
    "register_optimizer",
    "sample_exact",
    "sample_from_pool",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'calm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


def _is_command() -> bool:
    """Whether this process is the `calm` command: its console script, or `python -m calm`."""
    script = sys.modules.get("calm_command")
    return getattr(script, "is_running", False) or _module_that_runs(sys.orig_argv) == "calm"


def _module_that_runs(command: Sequence[str]) -> str | None:
    """The MODULE of `python -m MODULE`, read as the interpreter reads its own options."""
    rest = iter(command[1:])
    for argument in rest:
        if argument == "--check-hash-based-pycs":
            next(rest, None)
        elif not argument.startswith("-") or argument == "-":
            return None  # A script.
        elif not argument.startswith("--"):
            # One-letter options may stand together; the value of one that has a value may be attached.
            option = next((i for i, letter in enumerate(argument) if letter in "cmWX"), None)
            if option is None:
                continue
            value = argument[option + 1 :] or next(rest, None)
            if argument[option] in "cm":
                return value if argument[option] == "m" else None
    return None


if not _is_command():
    import_module("calm.models.registration").register()
