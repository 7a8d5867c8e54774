"""Cost of a model: parameters, and FLOPs per token, by part.

A multiply-add in a matrix product counts as two FLOPs; attention counts as 4 · positions · width per layer
and position, as if every query saw the whole context. Look-ups, norms and activations are not counted.
Training counts as three forward passes of the trained parts, plus one of the frozen encoder. A step of a CALM
is K tokens, but all figures are per token. The rules, and the figures that they reproduce
(tests/test_flops.py), are those of the paper, section 6.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from calm.errors import InputError, cause_of
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
from calm.models.heads import HeadFlops
from calm.models.hyperparameters import chunk_size_of
from calm.models.thoughts import thoughts_of
from calm.models.token_layers import LIKE_LLAMA, head_size, num_layer_weights
from calm.ranges import BLOCKS, NUM_THOUGHTS, Range

POSITIONS = 2048
"""Context length that the paper's figures assume, in positions (chunks for a CALM)."""


@dataclass(frozen=True)
class Work:
    """How a model is used.

    Args:
        positions: Positions of the context that attention sees.
        draws: Draws per chunk, each of which is decoded; 1 at T = 1.
        condition_per_draw: Whether the head's work on the hidden state is counted for every draw, as in the
            paper's figures, or once, as here, where all draws of a step share it.
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
        parameters: Parameters, by part.
        inference: FLOPs per generated token, by part.
        training: FLOPs per token of training text, by part.
    """

    parameters: dict[str, int] = field(default_factory=dict)
    inference: dict[str, float] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)


def cost_of(config: PreTrainedConfig, work: Work | None = None) -> Cost:
    """Cost of a CALM, or of a token-level Transformer with Llama-style layers.

    Args:
        config: Its configuration.
        work: How it is used.

    Raises:
        InputError: If the architecture is not supported, or the head does not say what it costs.
    """
    work = work or Work()
    inference, training = _inference_flops(config, work), _training_flops(config, work)
    size = chunk_size_of(config)
    return Cost(
        parameters=_count_parameters(config),
        inference={part: flops / size for part, flops in inference.items()},
        training={part: flops / size for part, flops in training.items()},
    )


def training_flops(config: PreTrainedConfig, context: int, teacher: PreTrainedConfig | None = None) -> float:
    """FLOPs per token of training a model, or an autoencoder, on blocks of `context` tokens.

    Args:
        config: Its configuration.
        context: Tokens per block.
        teacher: Configuration of the teacher that it learns from, whose forward pass is added.

    Raises:
        InputError: If the architecture is not supported.
    """
    if teacher is not None:
        return training_flops(config, context) + teaching_flops(teacher, context)
    if isinstance(config, CalmAutoencoderConfig):
        return autoencoder_training_flops(config)
    size = chunk_size_of(config)
    return sum(_training_flops(config, Work(context // size)).values()) / size


def teaching_flops(teacher: PreTrainedConfig, context: int) -> float:
    """FLOPs of a teacher per token of training text: its forward pass on blocks of `context` tokens.

    For architectures that `cost_of` does not know, torch counts the FLOPs of a network on the meta device.
    """
    try:
        return sum(cost_of(teacher, Work(context)).inference.values())
    except InputError:
        network = _on_meta_device(teacher).eval()
        with torch.device("meta"), torch.no_grad():
            tokens, mask = torch.zeros(1, context, dtype=torch.long), torch.zeros(1, 1, context, context)
            with FlopCounterMode(display=False) as counter:
                network(input_ids=tokens, attention_mask=mask, use_cache=False)
        return counter.get_total_flops() / context


def autoencoder_training_flops(config: CalmAutoencoderConfig) -> float:
    """FLOPs per token of training an autoencoder, which a language model needs first."""
    if config.has_codes:  # They are not trained.
        return 0.0
    vocabulary = config.chunk_size * config.vocab_size * config.hidden_size
    return 3 * 2 * (_encoder_of_chunks(config) + _decoder_of_chunks(config) + vocabulary) / config.chunk_size


@dataclass(frozen=True)
class CostOfThoughts:
    """Cost that thoughts (`calm.models.thoughts`) add to an answer.

    Args:
        number: Number of thoughts.
        flops_of_one: FLOPs of one thought.
        flops: FLOPs of all thoughts and the two markers around them.
    """

    number: int
    flops_of_one: float
    flops: float


def cost_of_thoughts(config: PreTrainedConfig, number: int, positions: int = POSITIONS) -> CostOfThoughts:
    """Cost that thoughts add to an answer, once and not per token.

    A thought that reads a state takes the backbone's layers at one position: no input projection, head,
    decoder or vocabulary projection. A marker, or a thought that reads `begin` again ("pause"), is read like
    any chunk or token.

    Args:
        config: Configuration of a CALM or a token-level Llama, whether or not it was trained to think.
        number: Number of thoughts, at least 0.
        positions: See `Work`.

    Raises:
        InputError: If the number is out of range, or the architecture is not supported.
    """
    NUM_THOUGHTS.require("number of thoughts", number)
    parts = _reading_flops(config, Work(positions))
    marker = sum(parts.values())
    thought = _layers(parts) if _thoughts_read_states(config) else marker
    return CostOfThoughts(number, thought, number * thought + 2 * marker)


def thinking_flops(
    config: PreTrainedConfig, prompt: int, thoughts: int | None, written: int, supervised: int = 0
) -> float:
    """FLOPs of training a model on one row: a prompt, thoughts, and the text after them.

    Counted as three forward passes of the trained parts, plus one of the frozen encoder. The layers process
    every position once, however many passes that takes. Attention is counted as if every query saw the whole
    row. All positions except thoughts that read a state are projected from their tokens. The head, or a
    Llama's vocabulary projection, runs only where text after the thoughts, or the label of a supervised
    thought, is predicted. Padding is not counted, so a batch of rows of different lengths costs more.

    Args:
        config: Configuration of a CALM or a token-level Llama.
        prompt: Positions of the prompt: chunks of a CALM, tokens of a Llama.
        thoughts: Number of thoughts, between two markers; None for neither.
        written: Positions of the text after the thoughts: the remaining steps and the answer.
        supervised: How many of the thoughts have a label.

    Raises:
        InputError: If a number is out of range, or the architecture is not supported.
    """
    for name, number in (("prompt", prompt), ("written", written)):
        BLOCKS.require(name, number)
    NUM_THOUGHTS.require("thoughts", thoughts or 0)
    Range(0, thoughts or 0).require("supervised", supervised)
    positions = prompt + written + (0 if thoughts is None else thoughts + 2)
    work = Work(positions)
    projected = positions - ((thoughts or 0) if _thoughts_read_states(config) else 0)
    parts, training = _reading_flops(config, work), _training_flops(config, work)
    layers, encoder = _layers(parts), training.get("encoder", 0.0)
    targets = written + supervised
    encoded = projected if "encoder" in parts else 0
    if not encoded or supervised:  # Otherwise the latents that the backbone reads are also the targets.
        encoded += targets
    return (
        3 * (positions * layers + projected * parts.get("input", 0.0))
        + targets * (training["head"] if "head" in training else training["vocabulary"])
        + encoded * encoder
    )


def _thoughts_read_states(config: PreTrainedConfig) -> bool:
    """Whether thoughts read the hidden state before them, rather than the token `begin` again."""
    thoughts = thoughts_of(config)
    return thoughts is None or thoughts.filling == "state"


def _layers(parts: dict[str, float]) -> float:
    """The part of `_reading_flops` that is spent in the layers."""
    return parts["backbone"] + parts["attention"]


def _reading_flops(config: PreTrainedConfig, work: Work) -> dict[str, float]:
    """FLOPs to read a position, by part: a chunk of a CALM, or a token.

    Raises:
        InputError: If the architecture is not supported.
    """
    if isinstance(config, CalmConfig):
        projection = {"input": 2.0 * _projection(config)}
        # Counted once, even if a latent is both input and target.
        encoder = {"encoder": 2.0 * _encoder_of_chunks(config.autoencoder)} if config.reads_latents else {}
        return projection | _layer_flops(config.backbone, work) | encoder
    if config.model_type in LIKE_LLAMA:  # Biases and norms do not count.
        return _layer_flops(config, work)
    raise InputError(
        f"FLOPs can only be counted for CALMs and models of type {', '.join(LIKE_LLAMA)}, "
        f"not '{config.model_type}'; use torch.utils.flop_counter for any other model that runs here."
    )


def _projection(config: CalmConfig) -> int:
    """Multiply-adds of the input projection, per chunk."""
    width = config.hidden_size
    if config.input_projection == "last":
        return config.input_size * width
    return config.input_size * 2 * width + 2 * width * width


def _layer_flops(config: Any, work: Work) -> dict[str, float]:
    """FLOPs of a Llama's layers per position, by part."""
    return {
        "backbone": 2.0 * _decoder_weights(config),
        "attention": float(_attention(config, work.positions)),
    }


def _inference_flops(config: PreTrainedConfig, work: Work) -> dict[str, float]:
    """FLOPs per position in generation, by part."""
    parts = _reading_flops(config, work)
    if not isinstance(config, CalmConfig):
        return parts | {"vocabulary": 2.0 * config.vocab_size * config.hidden_size}
    head, autoencoder = _head(config), config.autoencoder
    parts["head"] = head.shared * (work.draws if work.condition_per_draw else 1) + head.per_draw * work.draws
    if config.head.decodes_latents:
        parts["decoder"] = 2 * work.draws * _decoder_of_chunks(autoencoder)
        vocabulary = config.chunk_size * autoencoder.vocab_size * autoencoder.hidden_size
        parts["vocabulary"] = 2 * work.draws * vocabulary
    return parts


def _training_flops(config: PreTrainedConfig, work: Work) -> dict[str, float]:
    """FLOPs per position in training, by part."""
    parts = {part: 3 * flops for part, flops in _reading_flops(config, work).items() if part != "encoder"}
    if not isinstance(config, CalmConfig):
        return parts | {"vocabulary": 6.0 * config.vocab_size * config.hidden_size}
    head = _head(config)
    repeats = head.training_draws if work.condition_per_draw else 1
    parts["head"] = head.training_shared * repeats + head.training_per_draw * head.training_draws
    return parts | {"encoder": 2.0 * _encoder_of_chunks(config.autoencoder)}


def _head(config: CalmConfig) -> HeadFlops:
    try:
        return config.head.flops(config.hidden_size, config.latent_size)
    except NotImplementedError as error:
        raise InputError(str(error)) from error


def _decoder_weights(config: Any) -> int:
    """Multiply-adds of a Llama's layers at one position, excluding attention scores."""
    return config.num_hidden_layers * num_layer_weights(config)


def _attention(config: Any, positions: int) -> int:
    """FLOPs of attention scores and weighted sums of values at one position."""
    return 4 * positions * _query_width(config) * config.num_hidden_layers


def _query_width(config: Any) -> int:
    return config.num_attention_heads * head_size(config)


def _decoder_of_chunks(config: CalmAutoencoderConfig) -> int:
    """Multiply-adds that decode a latent, excluding the vocabulary projection."""
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
    """Number of parameters of a model by part; tied ones count once, with the part that comes first."""
    counts: dict[str, int] = {}
    for part, parameter in _parts(model):
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _count_parameters(config: PreTrainedConfig) -> dict[str, int]:
    return parameters_of(_on_meta_device(config))


def _on_meta_device(config: PreTrainedConfig) -> nn.Module:
    """A network on the meta device, which takes no memory."""
    try:
        with torch.device("meta"):
            if isinstance(config, CalmConfig):
                return CalmForCausalLM(config)
            network: nn.Module = AutoModelForCausalLM.from_config(config)
            return network
    except Exception as error:  # From the model's class.
        raise InputError(f"no model can be built from the configuration ({cause_of(error)}).") from error


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name and not name.startswith("autoencoder."):
            yield "embedding", parameter
        elif name.startswith("lm_head."):
            yield "vocabulary", parameter
        else:
            part = name.split(".")[0]
            yield {"model": "backbone", "projection": "input"}.get(part, part), parameter
