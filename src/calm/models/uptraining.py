"""Convert a token-level Transformer into a CALM made of its layers (docs/uptraining.md).

    all but the last layers   the backbone, over chunks; it reads the embedding of each chunk's last token
    the last layers           the head (calm.models.heads.decoder), which generates a chunk token by token
    the first layers          a copy in the head, which reads the tokens of the chunk being generated

Reused weights are those of the source, bit for bit; new ones start at zero. With one token per chunk and no
layers in the head, the CALM is the Transformer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from calm.errors import InputError, cause_of
from calm.models.attention import QK_NORM
from calm.models.blocks import LastTokenProjection
from calm.models.caches import CACHE
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
from calm.models.foreign import check_transformer
from calm.models.heads import DecoderHead, DecoderHeadConfig
from calm.models.token_layers import LAYER_SIZES, LIKE_LLAMA

CODE_SIZE = 8
"""Dimensions of a token's code in the autoencoder; a decoder head never decodes latents."""
_MARK = "is_new_beside_trained"


@dataclass(frozen=True)
class Cut:
    """Which layers of a Transformer go where.

    Args:
        first: Number of first layers copied to the head, where they read tokens; the backbone has them too.
        last: Number of last layers that go to the head instead of the backbone.
        layers: Layers to use, numbered from 0; None for all.
    """

    first: int
    last: int
    layers: Sequence[int] | None = None

    def split(self, num_layers: int) -> tuple[list[int], list[int], list[int]]:
        """Indices of the source's layers that become first layers, backbone, and last layers.

        Args:
            num_layers: Number of layers in the source.

        Raises:
            InputError: If the source does not have them, first and last layers overlap, or none is left for
                the backbone.
        """
        used = list(range(num_layers) if self.layers is None else self.layers)
        if used != sorted(set(used)) or not all(0 <= index < num_layers for index in used):
            raise InputError(
                f"layers must be in increasing order, between 0 and {num_layers - 1}, the source's last; "
                f"got {used}."
            )
        end = len(used) - self.last
        if min(self.first, self.last) < 0 or self.first > end or end < 1:
            raise InputError(
                f"the first {self.first} and the last {self.last} of {len(used)} layers must not overlap, "
                "and must leave at least one for the backbone; use fewer."
            )
        return used[: self.first], used[:end], used[end:]


class SpecialTokens(Protocol):
    """What a conversion needs from a tokenizer."""

    @property
    def pad_token_id(self) -> Any:
        """Id of the padding token."""

    @property
    def bos_token_id(self) -> Any:
        """Id of the BOS token, if there is one."""

    @property
    def eos_token_id(self) -> Any:
        """Id of the EOS token."""

    def __len__(self) -> int:
        """Number of tokens."""


class PlaceholderTokenizer:
    """The special tokens of a model whose tokenizer is not at hand, for counting and planning.

    Args:
        config: The configuration.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self.eos_token_id = next((end for end in ends if end is not None), 0)
        self.bos_token_id = config.bos_token_id
        self.pad_token_id = int(self.eos_token_id == 0)  # Any id but EOS will do.
        self._size = config.vocab_size

    def __len__(self) -> int:
        """The model's vocabulary size."""
        return self._size


def uptrained_config(
    source: PreTrainedConfig,
    tokenizer: SpecialTokens,
    chunk_size: int,
    cut: Cut,
    *,
    sink: bool = True,
    **others: Any,
) -> CalmConfig:
    """Configuration of the CALM made from a Transformer.

    Args:
        source: The Transformer's configuration.
        tokenizer: Its tokenizer, with a padding token other than EOS.
        chunk_size: Tokens per chunk K.
        cut: Which layers go where.
        sink: Whether windows of the head start with an attention sink.
        **others: Further arguments of `CalmConfig`.

    Raises:
        InputError: If the source is not supported, has too few layers, or has a smaller vocabulary than the
            tokenizer.
    """
    check_source(source, tokenizer, cut)
    first, backbone, last = cut.split(source.num_hidden_layers)
    if chunk_size == 1 and first:
        raise InputError(
            "the first layers read the earlier tokens of a chunk, but chunks of one token have none: set "
            f"first_layers to 0, not {cut.first}."
        )
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    try:
        return CalmConfig(
            autoencoder_config=CalmAutoencoderConfig(
                kind="codes",
                vocab_size=source.vocab_size,
                chunk_size=chunk_size,
                latent_size=CODE_SIZE * chunk_size,
                dropped_token_id=tokenizer.pad_token_id,
                **special,
            ),
            backbone_config=_layer_sizes_of(source) | {"num_hidden_layers": len(backbone)},
            head_config={
                "head_type": "decoder",
                "first_layers": len(first),
                "last_layers": len(last),
                "has_tied_scores": bool(source.tie_word_embeddings),
                "sink": sink,
            },
            input_projection="last",
            final_norm=False,
            initializer_range=source.initializer_range,
            **special,
            **others,
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"the source cannot be converted to a CALM: {cause_of(error)}") from error


def calm_from_transformer(
    source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chunk_size: int, cut: Cut, **others: Any
) -> CalmForCausalLM:
    """A CALM made of a Transformer's layers, before any training, with its dtype and device.

    Args:
        source: A causal language model with Llama-style layers: Llama, Mistral, Qwen2, Qwen3, SmolLM.
        tokenizer: Its tokenizer, with a padding token other than EOS.
        chunk_size: Tokens per chunk K.
        cut: Which layers go where.
        **others: Further arguments of `uptrained_config`.

    Raises:
        InputError: As `uptrained_config`; or if the source's embeddings are tied only in its configuration.
    """
    config = uptrained_config(source.config, tokenizer, chunk_size, cut, **others)
    decoder: Any = source.get_decoder()
    lm_head: Any = source.get_output_embeddings()
    if source.config.tie_word_embeddings and not torch.equal(decoder.embed_tokens.weight, lm_head.weight):
        raise InputError(
            "the source's configuration ties its output layer to its embeddings, but their weights differ; "
            "set its tie_word_embeddings to false."
        )
    # Created in this dtype: casting afterwards would round the rotary frequencies.
    model: CalmForCausalLM = CalmForCausalLM._from_config(config, dtype=source.dtype)
    head = model.head
    assert isinstance(head, DecoderHead) and isinstance(head.config, DecoderHeadConfig)
    no_sinks: list[dict[str, Tensor]] = [{}] * len(decoder.layers)
    sinks = _sinks_of(source, tokenizer) if head.config.sink else no_sinks
    parts = ((head.first.layers, sinks), (model.backbone.layers, no_sinks), (head.last.layers, sinks))
    for indices, (layers, part_sinks) in zip(cut.split(len(decoder.layers)), parts, strict=True):
        for index, layer in zip(indices, layers, strict=True):
            _copy_weights(layer, decoder.layers[index].state_dict() | part_sinks[index])
    with torch.no_grad():
        model.backbone.embed_tokens.weight.copy_(decoder.embed_tokens.weight)
        head.norm.weight.copy_(decoder.norm.weight)
        if head.scores is not None:
            head.scores.weight.copy_(lm_head.weight)
    return nn.Module.to(model, source.device).eval()


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Weights of a model, wrapped or not, that were not initialized from another model.

    Those of the modules that `mark_as_new` marked; if it marked none, those that a conversion from a
    Transformer adds, of which an ordinary CALM has none.
    """
    parts: list[nn.Module] = [module for module in model.modules() if getattr(module, _MARK, False)]
    for module in () if parts else model.modules():
        parts += [module.mix] if isinstance(module, LastTokenProjection) else []
        parts += [module.inject] if isinstance(module, DecoderHead) else []
    return [parameter for part in parts for parameter in part.parameters()]


def mark_as_new(*modules: nn.Module) -> None:
    """Mark modules of a model as new next to pretrained ones, for `new_parameters`."""
    for module in modules:
        setattr(module, _MARK, True)


def check_source(source: PreTrainedConfig, tokenizer: SpecialTokens, cut: Cut) -> None:
    """Raise InputError unless a Transformer can be converted to a CALM with this tokenizer.

    Args:
        source: Its configuration.
        tokenizer: The tokenizer.
        cut: Which of its layers are used.
    """
    kind = source.model_type
    if kind not in LIKE_LLAMA:
        raise InputError(
            f"a model of type '{kind}' cannot be converted to a CALM; supported: {', '.join(LIKE_LLAMA)}."
        )
    try:
        check_transformer(source)
    except ValueError as error:
        raise InputError(f"the source cannot be converted to a CALM: {error}") from error
    if getattr(source, "quantization_config", None) is not None:
        raise InputError(
            "a quantized model cannot be converted to a CALM, which needs training; use the original."
        )
    if (window := _window_of(source, cut)) is not None:
        raise InputError(
            f"a model whose attention sees only {window} tokens cannot be converted to a CALM; use one with "
            "full attention, or set its max_position_embeddings to that number."
        )
    if (share := (source.rope_parameters or {}).get("partial_rotary_factor") or 1) != 1:
        raise InputError(
            f"a model that rotates only part of each head (partial_rotary_factor {share}) cannot be "
            "converted to a CALM."
        )
    if len(tokenizer) > source.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, more than the {source.vocab_size} of the model to "
            "convert, whose vocabulary cannot grow; use one of its control tokens as padding."
        )
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise InputError(
            "the tokenizer needs an EOS token and a different token for padding; set its eos_token and "
            "pad_token."
        )


def _window_of(source: PreTrainedConfig, cut: Cut) -> int | None:
    """Sliding window of the layers in use, if a text can be longer; else None."""
    window: int | None = getattr(source, "sliding_window", None)
    if window is None or window >= source.max_position_embeddings:
        return None
    kinds = getattr(source, "layer_types", None) or ["sliding_attention"] * source.num_hidden_layers
    _, backbone, last = cut.split(source.num_hidden_layers)
    return window if any(kinds[index] != "full_attention" for index in backbone + last) else None


def _layer_sizes_of(source: PreTrainedConfig) -> dict[str, Any]:
    """Fields of `LlamaConfig` for the source's layers; Qwen2 has biases that its config does not name."""
    defaults: dict[str, Any] = {"attention_bias": source.model_type == "qwen2", "mlp_bias": False}
    sizes: dict[str, Any] = {name: getattr(source, name, defaults.get(name)) for name in LAYER_SIZES}
    if sizes["head_dim"] is None:
        sizes["head_dim"] = source.hidden_size // source.num_attention_heads
    return LlamaConfig(**sizes).to_dict() | ({QK_NORM: True} if source.model_type == "qwen3" else {})


@torch.no_grad()
def _sinks_of(source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    """Key and value of each layer at the first token of a text: BOS, or EOS if there is none."""
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    output = source(torch.tensor([[token]], device=source.device), use_cache=True, return_dict=True)
    return [
        {"sink_key": layer.keys[0], "sink_value": layer.values[0]} for layer in getattr(output, CACHE).layers
    ]


def _copy_weights(layer: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy a source layer's weights into a layer; biases that the source does not have are zero."""
    biases = {
        name: torch.zeros_like(weight)
        for name, weight in layer.state_dict().items()
        if name.endswith(".bias")
    }
    layer.load_state_dict(biases | weights)
