"""What a model costs: parameters, and FLOPs per token, by part.

Two FLOPs for each multiply-add of a matrix product; attention takes 4 · positions · width for each
layer and position, as if every query saw the whole context. Look-ups, norms and activations count nothing.
Training takes three times the forward pass of what is trained, and the forward pass of the frozen encoder.
A step of a CALM is K tokens: all figures are per token. The rules and the figures that they reproduce
(tests/test_flops.py) are those of the paper, section 6.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from calm.errors import InputError
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig

POSITIONS = 2048
"""Positions of the context that the paper's figures assume (of chunks for a CALM)."""


@dataclass(frozen=True)
class Work:
    """How a model is used.

    Args:
        positions: Positions of the context that attention sees.
        draws: Draws of a chunk, which are each decoded; 1 at T = 1.
        condition_per_draw: Whether the head's work on the hidden state, which all draws of a step share,
            is counted with every draw, as in the paper's figures, or once, as it is done here.
    """

    positions: int = POSITIONS
    draws: float = 1
    condition_per_draw: bool = False

    def __post_init__(self) -> None:
        if self.positions < 1 or self.draws < 1:
            raise InputError(
                f"positions and draws must be at least 1, got {self.positions} and {self.draws:g}."
            )


@dataclass(frozen=True)
class Cost:
    """Cost of a model.

    Args:
        parameters: By part.
        inference: FLOPs per token that is written, by part.
        training: FLOPs per token of training text, by part.
    """

    parameters: dict[str, int] = field(default_factory=dict)
    inference: dict[str, float] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)


def cost_of(config: PreTrainedConfig, work: Work | None = None) -> Cost:
    """Cost of a CALM, or of a Llama of tokens.

    Args:
        config: Its configuration.
        work: How it is used.

    Raises:
        InputError: If the architecture is another one, or the head does not say what it costs.
    """
    work = work or Work()
    if isinstance(config, CalmConfig):
        return _cost_of_calm(config, work)
    if isinstance(config, LlamaConfig):
        return _cost_of_llama(config, work)
    raise InputError(
        f"FLOPs are counted for CALM and Llama models, not for '{config.model_type}'; "
        "torch.utils.flop_counter counts any model that runs here."
    )


def training_flops(config: PreTrainedConfig, context: int) -> float:
    """FLOPs per token of training a model, or an autoencoder, on blocks of `context` tokens.

    Raises:
        InputError: If they are not known.
    """
    if isinstance(config, CalmAutoencoderConfig):
        return autoencoder_training_flops(config)
    size = config.chunk_size if isinstance(config, CalmConfig) else 1
    return sum(cost_of(config, Work(context // size)).training.values())


def autoencoder_training_flops(config: CalmAutoencoderConfig) -> float:
    """FLOPs per token of training an autoencoder, which a language model on it needs first."""
    if config.has_codes:  # They are not trained.
        return 0.0
    vocabulary = config.chunk_size * config.vocab_size * config.hidden_size
    return 3 * 2 * (_encoder_of_chunks(config) + _decoder_of_chunks(config) + vocabulary) / config.chunk_size


def _cost_of_llama(config: LlamaConfig, work: Work) -> Cost:
    forward = {
        "backbone": 2 * _decoder_weights(config),
        "attention": _attention(config, work.positions),
        "vocabulary": 2 * config.vocab_size * config.hidden_size,
    }
    return Cost(
        parameters=_count_parameters(config),
        inference={part: float(flops) for part, flops in forward.items()},
        training={part: 3.0 * flops for part, flops in forward.items()},
    )


def _cost_of_calm(config: CalmConfig, work: Work) -> Cost:
    size, backbone, autoencoder = config.chunk_size, config.backbone, config.autoencoder
    width = config.hidden_size
    try:
        head = config.head.flops(width, config.latent_size)
    except NotImplementedError as error:
        raise InputError(str(error)) from error
    once = {
        "input": 2 * (config.input_size * 2 * width + 2 * width * width),
        "backbone": 2 * _decoder_weights(backbone),
        "attention": _attention(backbone, work.positions),
    }
    encoder = {"encoder": 2 * _encoder_of_chunks(autoencoder)}  # Once where a latent is input and target.
    inference: dict[str, float] = {**once, **(encoder if config.reads_latents else {})}
    inference |= {
        "head": head.shared * (work.draws if work.condition_per_draw else 1) + head.per_draw * work.draws,
    }
    if config.head.decodes_latents:
        inference["decoder"] = 2 * work.draws * _decoder_of_chunks(autoencoder)
        inference["vocabulary"] = 2 * work.draws * size * autoencoder.vocab_size * autoencoder.hidden_size
    times = head.training_draws if work.condition_per_draw else 1
    training = {part: 3 * flops for part, flops in once.items()} | {
        "head": head.training_shared * times + head.training_per_draw * head.training_draws
    }
    training |= encoder
    return Cost(
        parameters=_count_parameters(config),
        inference={part: flops / size for part, flops in inference.items()},
        training={part: flops / size for part, flops in training.items()},
    )


def _decoder_weights(config: LlamaConfig) -> int:
    """Multiply-adds of a Llama's layers at one position, attention scores aside."""
    width, queries = config.hidden_size, _query_width(config)
    # Configurations fill in what was left open, which their types do not say.
    keys = queries // config.num_attention_heads * (config.num_key_value_heads or config.num_attention_heads)
    attention = 2 * width * queries + 2 * width * keys
    return config.num_hidden_layers * (attention + 3 * width * config.intermediate_size)


def _attention(config: LlamaConfig, positions: int) -> int:
    """FLOPs of attention scores and their sums at one position."""
    return 4 * positions * _query_width(config) * config.num_hidden_layers


def _query_width(config: LlamaConfig) -> int:
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * size


def _decoder_of_chunks(config: CalmAutoencoderConfig) -> int:
    """Multiply-adds that decode a latent, vocabulary projection aside."""
    if config.has_codes:
        return 0
    size, width = config.chunk_size, config.hidden_size
    block, half = 3 * width * config.intermediate_size, config.num_decoder_layers // 2
    blocks = half * block + (config.num_decoder_layers - half) * size * block
    return config.latent_size * width + size * width * width + blocks


def _encoder_of_chunks(config: CalmAutoencoderConfig) -> int:
    """Multiply-adds that encode a chunk."""
    if config.has_codes:
        return 0
    size, width = config.chunk_size, config.hidden_size
    block, half = 3 * width * config.intermediate_size, config.num_encoder_layers // 2
    blocks = half * size * block + (config.num_encoder_layers - half) * block
    return blocks + size * width * width + width * 2 * config.latent_size


def parameters_of(model: nn.Module) -> dict[str, int]:
    """Parameters of a model by part, each once (tied ones with the part that comes first)."""
    counts: dict[str, int] = {}
    for part, parameter in _parts(model):
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _count_parameters(config: PreTrainedConfig) -> dict[str, int]:
    with torch.device("meta"):
        model: nn.Module
        if isinstance(config, CalmConfig):
            model = CalmForCausalLM(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
    return parameters_of(model)


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name and not name.startswith("autoencoder."):
            yield "embedding", parameter
        elif name.startswith("lm_head."):
            yield "vocabulary", parameter
        else:
            part = name.split(".")[0]
            yield {"model": "backbone", "projection": "input"}.get(part, part), parameter
