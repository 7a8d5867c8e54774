"""Generative heads: backbone state -> draws of the next chunk.

A head is one file with a configuration dataclass and a module, registered under the name that checkpoints
store as `head_type`. docs/heads.md shows how to add one.
"""

from typing import Any

from calm.models.heads.categorical_flow import CategoricalFlowHead, CategoricalFlowHeadConfig
from calm.models.heads.coarse_to_fine import CoarseToFineHead, CoarseToFineHeadConfig
from calm.models.heads.contract import (
    Distillable,
    GenerativeHead,
    LatentHead,
    Likelihood,
    Target,
    TokenDistribution,
    TokenDistributions,
    TokenProbabilities,
)
from calm.models.heads.decoder import DecoderHead, DecoderHeadConfig
from calm.models.heads.diffusion import DiffusionHead, DiffusionHeadConfig
from calm.models.heads.energy import EnergyHead, EnergyHeadConfig
from calm.models.heads.fields import HeadConfig, HeadFlops, check_counts
from calm.models.heads.flow import FlowHead, FlowHeadConfig
from calm.models.heads.parallel import ParallelHead, ParallelHeadConfig
from calm.models.heads.registry import (
    build_head,
    parse_head_config,
    register_head,
    with_sampling,
    with_training,
)
from calm.models.heads.sequential import SequentialHead, SequentialHeadConfig

register_head("energy", EnergyHeadConfig, EnergyHead)
register_head("flow", FlowHeadConfig, FlowHead)
register_head("diffusion", DiffusionHeadConfig, DiffusionHead)
register_head("categorical_flow", CategoricalFlowHeadConfig, CategoricalFlowHead)
register_head("sequential", SequentialHeadConfig, SequentialHead)
register_head("decoder", DecoderHeadConfig, DecoderHead)
register_head("coarse_to_fine", CoarseToFineHeadConfig, CoarseToFineHead)
register_head("parallel", ParallelHeadConfig, ParallelHead)

# Names from version 0.1; the hints stay for one version.
_RENAMED = {
    "HeadWork": "HeadFlops, which counts FLOPs, two for each multiply-add",
    "Teachable": "Distillable",
    "TokenChances": "TokenProbabilities",
    "takes_temperature": "config.lowest_temperature < 1",
}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise ImportError(f"calm.models.heads.{name} is now {_RENAMED[name]}.")
    raise AttributeError(f"module 'calm.models.heads' has no attribute '{name}'")


__all__ = [
    "CategoricalFlowHead",
    "CategoricalFlowHeadConfig",
    "CoarseToFineHead",
    "CoarseToFineHeadConfig",
    "DecoderHead",
    "DecoderHeadConfig",
    "DiffusionHead",
    "DiffusionHeadConfig",
    "Distillable",
    "EnergyHead",
    "EnergyHeadConfig",
    "FlowHead",
    "FlowHeadConfig",
    "GenerativeHead",
    "HeadConfig",
    "HeadFlops",
    "LatentHead",
    "Likelihood",
    "ParallelHead",
    "ParallelHeadConfig",
    "SequentialHead",
    "SequentialHeadConfig",
    "Target",
    "TokenDistribution",
    "TokenDistributions",
    "TokenProbabilities",
    "build_head",
    "check_counts",
    "parse_head_config",
    "register_head",
    "with_sampling",
    "with_training",
]
