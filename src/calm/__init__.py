"""CALM: language models that predict one vector for a chunk of several tokens (arXiv 2510.27688).

`import calm` registers the models with the Auto classes of transformers. The console script `calm` is the
exception: `calm_command` sets a flag before it imports the package, and the models are registered when
`calm.models.loading` is imported to open one.
"""

import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calm.core.brier import brier_lm, brier_scores
    from calm.core.energy import energy_loss
    from calm.core.gaussian import DiagonalGaussian
    from calm.core.samplers import ExactSampler, HeadSampler, PoolSampler
    from calm.core.temperature import sample_exact, sample_from_pool
    from calm.data.formats import register_format
    from calm.models.autoencoder import CalmAutoencoder
    from calm.models.calm import CalmForCausalLM
    from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
    from calm.models.generation.sampler_registry import register_sampler, sampler_from
    from calm.models.heads import GenerativeHead, HeadConfig, LatentHead, register_head
    from calm.training.optimizers import register_optimizer

__version__ = "0.1.0"

# Public name -> the module that defines it.
_MODULES = {
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
    "register_format": "calm.data.formats",
    "register_head": "calm.models.heads",
    "ExactSampler": "calm.core.samplers",
    "HeadSampler": "calm.core.samplers",
    "LatentHead": "calm.models.heads",
    "PoolSampler": "calm.core.samplers",
    "register_optimizer": "calm.training.optimizers",
    "register_sampler": "calm.models.generation.sampler_registry",
    "sampler_from": "calm.models.generation.sampler_registry",
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
    "ExactSampler",
    "GenerativeHead",
    "HeadConfig",
    "HeadSampler",
    "LatentHead",
    "PoolSampler",
    "__version__",
    "brier_lm",
    "brier_scores",
    "energy_loss",
    "register_format",
    "register_head",
    "register_optimizer",
    "register_sampler",
    "sample_exact",
    "sample_from_pool",
    "sampler_from",
]
# Names of version 0.1 that have been renamed; kept for one version.
_RENAMED = {"TemperatureSettings": "sampler_from"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"calm.{name} is now calm.{_RENAMED[name]}.", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'calm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


import_module("calm.renamed").install()

# Registration imports torch, and `calm --help` should answer at once.
if not getattr(sys.modules.get("calm_command"), "is_running", False):
    import_module("calm.models.registration").register()
