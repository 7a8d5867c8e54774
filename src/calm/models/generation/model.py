"""What generation needs to know about a model."""

from typing import Any, Protocol

import torch
from torch import Tensor

from calm.core.random import Randomness
from calm.core.samplers import Sampler
from calm.core.temperature import ChunkSample
from calm.models.autoencoder import CalmAutoencoder
from calm.models.configuration import CalmConfig
from calm.models.heads import GenerativeHead


class ChunkModel(Protocol):
    """A model that predicts chunks: a backbone over chunks, a generative head and an autoencoder."""

    config: CalmConfig
    autoencoder: CalmAutoencoder
    head: GenerativeHead
    generation_config: Any

    @property
    def device(self) -> torch.device:
        """The device of the weights."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """States of chunks; see `CalmForCausalLM.forward`."""

    def get_compiled_call(self, config: Any, /) -> Any:
        """`__call__`, compiled."""

    def draw_chunks(self, states_PD: Tensor, num_draws: int, randomness: Randomness = None) -> Tensor:
        """Draws of the next chunk for each state, (N, P, K)."""

    def sample_chunks(
        self, states_PD: Tensor, sampler: Sampler, randomness: Randomness = None, compiled: Any = None
    ) -> ChunkSample:
        """Sample one next chunk per state, with statistics."""
