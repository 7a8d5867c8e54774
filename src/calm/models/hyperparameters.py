"""Hyperparameters shared by recipes and model configurations, each defined once with its range.

This file imports neither torch nor transformers: the command line reads it for its help.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from calm.ranges import Range

CALM_TYPES = ("calm", "calm_autoencoder")
"""Model types of this package's own architectures."""

AutoencoderKind = Literal["mlp", "codes"]
BackboneInput = Literal["tokens", "latents", "both"]

SIZES = Range(1, 10**6)
LAYERS = Range(1, 10_000)
TOKEN_LAYERS = Range(0, 10_000)
ABOVE_ZERO = Range(0, includes_low=False)
SHARES_BELOW_ONE = Range(0, 1, includes_high=False)
_NOT_NEGATIVE = Range(0)


@dataclass(kw_only=True)
class AutoencoderHyperparameters:
    """Hyperparameters of the chunk autoencoder (paper section 2).

    Args:
        kind: "mlp" for the published autoencoder; "codes" for fixed token codes, which need no training and,
            of the settings below, use only the latent size.
        latent_size: Dimensions of a latent.
        hidden_size: Width.
        intermediate_size: Inner width of the MLPs.
        num_encoder_layers: Number of encoder blocks, even.
        num_decoder_layers: Number of decoder blocks, even.
        token_dropout: Fraction of input tokens dropped in training.
        latent_dropout: Fraction of latent entries dropped in training.
        kl_weight: Weight of the KL term.
        kl_floor: Floor on the KL of each latent dimension, in nats.
    """

    kind: AutoencoderKind = "mlp"
    latent_size: int = 128
    hidden_size: int = 512
    intermediate_size: int = 1280
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    token_dropout: float = 0.15
    latent_dropout: float = 0.15
    kl_weight: float = 1e-3
    kl_floor: float = 0.5


AUTOENCODER_RANGES = {
    "latent_size": SIZES,
    "hidden_size": SIZES,
    "intermediate_size": SIZES,
    "num_encoder_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "token_dropout": SHARES_BELOW_ONE,
    "latent_dropout": SHARES_BELOW_ONE,
    "kl_weight": _NOT_NEGATIVE,
    "kl_floor": _NOT_NEGATIVE,
}


@dataclass(kw_only=True)
class DecoderHyperparameters:
    """Hyperparameters of the Llama-style decoder: backbone over chunks, or autoregressive model over tokens.

    Args:
        hidden_size: Width of the backbone.
        intermediate_size: Inner width of its MLPs.
        num_layers: Number of layers.
        num_heads: Number of attention heads.
        num_key_value_heads: Number of key-value heads; none for as many as attention heads.
        max_chunks: Longest sequence in chunks (in tokens for an autoregressive model).
        rope_theta: Base of the rotary position embedding.
    """

    hidden_size: int = 512
    intermediate_size: int = 1376
    num_layers: int = 8
    num_heads: int = 8
    num_key_value_heads: int | None = None
    max_chunks: int = 2048
    rope_theta: float = 10000.0

    def as_llama(self) -> dict[str, Any]:
        """The arguments of `transformers.LlamaConfig`."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "max_position_embeddings": self.max_chunks,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }


DECODER_RANGES = {
    "hidden_size": SIZES,
    "intermediate_size": SIZES,
    "num_layers": LAYERS,
    "num_heads": SIZES,
    "num_key_value_heads": SIZES,
    "max_chunks": Range(1, 10**9),
    "rope_theta": ABOVE_ZERO,
}


@dataclass(kw_only=True)
class InputHyperparameters:
    """Hyperparameters of the backbone's input.

    Args:
        embedding_initializer_range: Standard deviation of new token embeddings (see CalmConfig).
        backbone_input: What the backbone reads of a chunk: its tokens, its latent, or both (see CalmConfig).
    """

    embedding_initializer_range: float = 0.02
    backbone_input: BackboneInput = "tokens"


INPUT_RANGES = {"embedding_initializer_range": _NOT_NEGATIVE}


def values_of(kind: type, settings: Any) -> dict[str, Any]:
    """Values of `settings` for the fields of a dataclass that they extend."""
    return {field.name: getattr(settings, field.name) for field in fields(kind)}


def chunk_size_of(config: Any) -> int:
    """Tokens per chunk K of a CALM or an autoencoder; 1 for a token-level model.

    Other architectures may have a `chunk_size` of another meaning, as state space models do.
    """
    return config.chunk_size if config.model_type in CALM_TYPES else 1
