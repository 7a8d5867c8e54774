"""What a model costs: parameters, and FLOPs per token, by part.

Two FLOPs for each multiply-add of a matrix product; attention takes 4 · positions · width for each
layer and position, as if every query saw the whole context. Look-ups, norms and activations count nothing.
Training takes three times the forward pass of what is trained, and the forward pass of the frozen encoder.
A step of a CALM is K tokens: all figures are per token. The rules and the figures that they reproduce
(tests/test_flops.py) are those of the paper, section 6.
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
from calm.models.thoughts import thoughts_of
from calm.models.token_layers import LIKE_LLAMA, head_size, weights_of_layer
from calm.ranges import BLOCKS, NUM_THOUGHTS

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
    """Cost of a CALM, or of a Transformer of tokens with the layers of Llama.

    Args:
        config: Its configuration.
        work: How it is used.

    Raises:
        InputError: If the architecture is another one, or the head does not say what it costs.
    """
    work = work or Work()
    inference, training = _inference(config, work), _training(config, work)
    size = _chunk_size(config)
    return Cost(
        parameters=_count_parameters(config),
        inference={part: flops / size for part, flops in inference.items()},
        training={part: flops / size for part, flops in training.items()},
    )


def training_flops(config: PreTrainedConfig, context: int) -> float:
    """FLOPs per token of training a model, or an autoencoder, on blocks of `context` tokens.

    Raises:
        InputError: If they are not known.
    """
    if isinstance(config, CalmAutoencoderConfig):
        return autoencoder_training_flops(config)
    size = _chunk_size(config)
    return sum(_training(config, Work(context // size)).values()) / size


def teaching_flops(teacher: PreTrainedConfig, context: int) -> float:
    """FLOPs per token of training text that a teacher takes: its forward pass on blocks of `context` tokens.

    For architectures that `cost_of` does not know, torch counts those of a network without memory.
    """
    try:
        return sum(cost_of(teacher, Work(context)).inference.values())
    except InputError:
        network = _outline(teacher).eval()
        with torch.device("meta"), torch.no_grad():
            tokens, mask = torch.zeros(1, context, dtype=torch.long), torch.zeros(1, 1, context, context)
            with FlopCounterMode(display=False) as counter:
                network(input_ids=tokens, attention_mask=mask, use_cache=False)
        return counter.get_total_flops() / context


def autoencoder_training_flops(config: CalmAutoencoderConfig) -> float:
    """FLOPs per token of training an autoencoder, which a language model on it needs first."""
    if config.has_codes:  # They are not trained.
        return 0.0
    vocabulary = config.chunk_size * config.vocab_size * config.hidden_size
    return 3 * 2 * (_encoder_of_chunks(config) + _decoder_of_chunks(config) + vocabulary) / config.chunk_size


@dataclass(frozen=True)
class CostOfThoughts:
    """What thoughts (`calm.models.thoughts`) add to an answer.

    Args:
        number: How many.
        flops_of_one: FLOPs of a thought.
        flops: FLOPs of all of them, and of the two markers around them.
    """

    number: int
    flops_of_one: float
    flops: float


def cost_of_thoughts(config: PreTrainedConfig, number: int, positions: int = POSITIONS) -> CostOfThoughts:
    """What thoughts add to an answer: not for each token of it, but once.

    A thought that reads a state takes the layers for one position of the backbone: no input projection, no
    head, no decoder, no vocabulary. A marker, and a thought that reads `begin` once more ("pause"), are read
    like any chunk or token.

    Args:
        config: Configuration of a CALM, or of a Llama of tokens, whether it was trained to think or not.
        number: Thoughts, at least 0.
        positions: See `Work`.

    Raises:
        InputError: If the number is out of range, or the architecture is another one.
    """
    NUM_THOUGHTS.require("number of thoughts", number)
    parts = _reading(config, Work(positions))
    marker = sum(parts.values())
    one = _layers(parts) if _thinks_in_states(config) else marker
    return CostOfThoughts(number, one, number * one + 2 * marker)


def thinking_flops(config: PreTrainedConfig, prompt: int, thoughts: int | None, written: int) -> float:
    """FLOPs of training a model on one row: a prompt, what is thought, and what is written after it.

    Three times the forward pass of what is trained, and the forward pass of the frozen encoder. The layers
    read every position once, in however many passes. Attention is counted as if every query saw the whole
    row. All positions but thoughts that read a state are projected from their tokens. The head, or the
    vocabulary projection of a Llama, works where something written is predicted, and nowhere else. Padding
    counts nothing, so a batch of rows of several lengths takes more.

    Args:
        config: Configuration of a CALM, or of a Llama of tokens.
        prompt: Positions of the prompt: chunks of a CALM, tokens of a Llama.
        thoughts: Thoughts, between two markers; None for neither.
        written: Positions of the steps that are left and of the answer.

    Raises:
        InputError: If a number is out of range, or the architecture is another one.
    """
    for name, number in (("prompt", prompt), ("written", written)):
        BLOCKS.require(name, number)
    NUM_THOUGHTS.require("thoughts", thoughts or 0)
    positions = prompt + written + (0 if thoughts is None else thoughts + 2)
    work = Work(positions)
    projected = positions - ((thoughts or 0) if _thinks_in_states(config) else 0)
    parts, training = _reading(config, work), _training(config, work)
    layers, encoder = _layers(parts), training.get("encoder", 0.0)
    is_encoded_once = "encoder" in parts  # Latents that are read are the targets as well.
    return (
        3 * (positions * layers + projected * parts.get("input", 0.0))
        + written * (training["head"] if "head" in training else training["vocabulary"])
        + (projected if is_encoded_once else written) * encoder
    )


def _thinks_in_states(config: PreTrainedConfig) -> bool:
    thoughts = thoughts_of(config)
    return thoughts is None or thoughts.filling == "state"


def _layers(parts: dict[str, float]) -> float:
    return parts["backbone"] + parts["attention"]


def _chunk_size(config: PreTrainedConfig) -> int:
    return config.chunk_size if isinstance(config, CalmConfig) else 1


def _reading(config: PreTrainedConfig, work: Work) -> dict[str, float]:
    """FLOPs to read a position, by part: a chunk of a CALM, or a token.

    Raises:
        InputError: If the architecture is another one.
    """
    if isinstance(config, CalmConfig):
        once = {"input": 2.0 * _projection(config)}
        # Once where a latent is input and target.
        encoder = {"encoder": 2.0 * _encoder_of_chunks(config.autoencoder)} if config.reads_latents else {}
        return once | _of_layers(config.backbone, work) | encoder
    if config.model_type in LIKE_LLAMA:  # Biases and norms do not count.
        return _of_layers(config, work)
    raise InputError(
        f"FLOPs are counted for CALMs and models of type {', '.join(LIKE_LLAMA)}, "
        f"not '{config.model_type}'; torch.utils.flop_counter counts any model that runs here."
    )


def _projection(config: CalmConfig) -> int:
    """Multiply-adds that make a chunk's input."""
    width = config.hidden_size
    if config.input_projection == "last":
        return config.input_size * width
    return config.input_size * 2 * width + 2 * width * width


def _of_layers(config: Any, work: Work) -> dict[str, float]:
    return {
        "backbone": 2.0 * _decoder_weights(config),
        "attention": float(_attention(config, work.positions)),
    }


def _inference(config: PreTrainedConfig, work: Work) -> dict[str, float]:
    """FLOPs of a position, by part, as text is written."""
    parts = _reading(config, work)
    if not isinstance(config, CalmConfig):
        return parts | {"vocabulary": 2.0 * config.vocab_size * config.hidden_size}
    head, autoencoder = _head(config), config.autoencoder
    parts["head"] = head.shared * (work.draws if work.condition_per_draw else 1) + head.per_draw * work.draws
    if config.head.decodes_latents:
        parts["decoder"] = 2 * work.draws * _decoder_of_chunks(autoencoder)
        vocabulary = config.chunk_size * autoencoder.vocab_size * autoencoder.hidden_size
        parts["vocabulary"] = 2 * work.draws * vocabulary
    return parts


def _training(config: PreTrainedConfig, work: Work) -> dict[str, float]:
    """FLOPs of a position, by part, as a model is trained."""
    parts = {part: 3 * flops for part, flops in _reading(config, work).items() if part != "encoder"}
    if not isinstance(config, CalmConfig):
        return parts | {"vocabulary": 6.0 * config.vocab_size * config.hidden_size}
    head = _head(config)
    times = head.training_draws if work.condition_per_draw else 1
    parts["head"] = head.training_shared * times + head.training_per_draw * head.training_draws
    return parts | {"encoder": 2.0 * _encoder_of_chunks(config.autoencoder)}


def _head(config: CalmConfig) -> HeadFlops:
    try:
        return config.head.flops(config.hidden_size, config.latent_size)
    except NotImplementedError as error:
        raise InputError(str(error)) from error


def _decoder_weights(config: Any) -> int:
    """Multiply-adds of a Llama's layers at one position, attention scores aside."""
    return config.num_hidden_layers * weights_of_layer(config)


def _attention(config: Any, positions: int) -> int:
    """FLOPs of attention scores and their sums at one position."""
    return 4 * positions * _query_width(config) * config.num_hidden_layers


def _query_width(config: Any) -> int:
    return config.num_attention_heads * head_size(config)


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
    return parameters_of(_outline(config))


def _outline(config: PreTrainedConfig) -> nn.Module:
    """A network on the meta device, which takes no memory."""
    try:
        with torch.device("meta"):
            if isinstance(config, CalmConfig):
                return CalmForCausalLM(config)
            network: nn.Module = AutoModelForCausalLM.from_config(config)
            return network
    except Exception as error:  # Of whichever class it is.
        raise InputError(f"the configuration makes no model ({cause_of(error)}).") from error


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name and not name.startswith("autoencoder."):
            yield "embedding", parameter
        elif name.startswith("lm_head."):
            yield "vocabulary", parameter
        else:
            part = name.split(".")[0]
            yield {"model": "backbone", "projection": "input"}.get(part, part), parameter
