"""Generative heads: hidden state of the backbone -> draws of the next latent.

A head is one file with a configuration dataclass and a module, joined in the registry under the
name that `head_type` carries in a checkpoint.
"""

from calm.models.heads.base import (
    GenerativeHead,
    HeadConfig,
    build_head,
    parse_head_config,
    register_head,
)
from calm.models.heads.energy import EnergyHead, EnergyHeadConfig

register_head("energy", EnergyHeadConfig, EnergyHead)

__all__ = [
    "EnergyHead",
    "EnergyHeadConfig",
    "GenerativeHead",
    "HeadConfig",
    "build_head",
    "parse_head_config",
    "register_head",
]
