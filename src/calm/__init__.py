"""CALM: language models that predict one vector for several tokens (arXiv 2510.27688).

`import calm` makes the models known to the Auto classes of transformers. Only in the process of the
`calm` command does it not, because that imports torch, and `calm --help` should answer at once.
"""

import sys
from importlib import import_module
from pathlib import PurePath
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
    "TemperatureSettings": "calm.core.temperature",
    "sample_exact": "calm.core.temperature",
    "sample_from_pool": "calm.core.temperature",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'calm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


# During the import of the package, `python -m calm` shows as "-m".
if PurePath(sys.argv[0] if sys.argv else "").stem not in ("calm", "-m"):
    import_module("calm.models.registration").register()
