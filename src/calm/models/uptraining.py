"""A Transformer of tokens becomes a CALM made of its own layers (docs/uptraining.md).

    all but the last layers   the backbone, over chunks; it reads the embedding of each chunk's last token
    the last layers           the head (calm.models.heads.decoder), which writes a chunk token by token
    the first layers          once more, in the head: they read the tokens of the chunk that is written

Every weight is that of the source, bit for bit, and what is new begins as zero. With one token per chunk and
no layers in the head, the CALM is the Transformer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from calm.errors import InputError, cause_of
from calm.models.blocks import LastTokenProjection
from calm.models.caches import CACHE
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
from calm.models.heads import DecoderHead
from calm.models.token_layers import LAYER_SIZES

CODE_SIZE = 8
"""Dimensions of a token's code in the autoencoder, which a decoder head never decodes."""
_MARK = "is_new_beside_trained"
_SOURCES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class Cut:
    """Which layers of a Transformer go where.

    Args:
        first: So many of the first layers read tokens in the head; the backbone has them, too.
        last: So many of the last layers are in the head, and not in the backbone.
        layers: Those that are used, by their numbers from 0 on; None for all.
    """

    first: int
    last: int
    layers: Sequence[int] | None = None

    def of(self, num_layers: int) -> tuple[list[int], list[int], list[int]]:
        """Numbers of a source's layers: the first ones, those of the backbone, the last ones.

        Args:
            num_layers: Layers that the source has.

        Raises:
            InputError: If it does not have them, or none is left for the backbone.
        """
        used = list(range(num_layers) if self.layers is None else self.layers)
        if used != sorted(set(used)) or not all(0 <= number < num_layers for number in used):
            raise InputError(
                f"the layers to use must rise from 0 to at most {num_layers - 1}, the source's last one; "
                f"got {used}."
            )
        end = len(used) - self.last
        if min(self.first, self.last) < 0 or self.first > end or end < 1:
            raise InputError(
                f"{len(used)} layers cannot be cut so that the first {self.first} and the last {self.last} "
                "are apart and the backbone has one; take fewer."
            )
        return used[: self.first], used[:end], used[end:]


def uptrained_config(
    source: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, chunk_size: int, cut: Cut, **others: Any
) -> CalmConfig:
    """The configuration of the CALM that a Transformer becomes.

    Args:
        source: The Transformer's.
        tokenizer: Its tokenizer, with a token for padding that is not its end of a text.
        chunk_size: Tokens per chunk K.
        cut: Which layers go where.
        **others: Further arguments of `CalmConfig`.

    Raises:
        InputError: If the source has another architecture, fewer layers, or a smaller vocabulary than the
            tokenizer.
    """
    check_source(source, tokenizer)
    first, backbone, last = cut.of(source.num_hidden_layers)
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
            },
            input_projection="last",
            final_norm=False,
            initializer_range=source.initializer_range,
            **special,
            **others,
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"the source does not make a CALM: {cause_of(error)}") from error


def calm_from_transformer(
    source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chunk_size: int, cut: Cut, **others: Any
) -> CalmForCausalLM:
    """A CALM of the layers of a Transformer, before any training.

    Args:
        source: A causal language model with the layers of Llama: Llama, Mistral, Qwen2, SmolLM.
        tokenizer: Its tokenizer, with a token for padding that is not its end of a text.
        chunk_size: Tokens per chunk K.
        cut: Which layers go where.
        **others: Further arguments of `CalmConfig`.

    Raises:
        InputError: As `uptrained_config`.
    """
    config = uptrained_config(source.config, tokenizer, chunk_size, cut, **others)
    model: CalmForCausalLM = nn.Module.to(CalmForCausalLM(config), source.dtype)
    head = model.head
    assert isinstance(head, DecoderHead)
    network: Any = source.get_decoder()
    sinks = _sinks_of(source, tokenizer)
    parts = (head.first.layers, model.backbone.layers, head.last.layers)
    for numbers, layers in zip(cut.of(len(network.layers)), parts, strict=True):
        for number, layer in zip(numbers, layers, strict=True):
            _copy_layer(network.layers[number], layer, sinks[number])
    with torch.no_grad():
        model.backbone.embed_tokens.weight.copy_(network.embed_tokens.weight)
        head.norm.weight.copy_(network.norm.weight)
        if head.scores is not None:
            head.scores.weight.copy_(source.get_output_embeddings().weight)
    return nn.Module.to(model, source.device).eval()


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights of a model, wrapped or not, that it did not get from the one that it is made of.

    None where it is not made of another; those of `mark_as_new` where there are any.
    """
    parts: list[nn.Module] = [module for module in model.modules() if getattr(module, _MARK, False)]
    for module in model.modules() if not parts else ():
        parts += [module.mix] if isinstance(module, LastTokenProjection) else []
        parts += [module.inject] if isinstance(module, DecoderHead) else []
    return [parameter for part in parts for parameter in part.parameters()]


def mark_as_new(*modules: nn.Module) -> None:
    """Tell `new_parameters` which modules of a model are new beside trained ones."""
    for module in modules:
        setattr(module, _MARK, True)


def check_source(source: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError unless a Transformer can become a CALM with a tokenizer.

    Args:
        source: Its configuration.
        tokenizer: The tokenizer.
    """
    kind = source.model_type
    if kind not in _SOURCES:
        why = (
            ", whose layers normalize queries and keys, which the backbone's do not"
            if kind == "qwen3"
            else ""
        )
        raise InputError(f"a model of type '{kind}' cannot become a CALM{why}; {', '.join(_SOURCES)} can.")
    window = getattr(source, "sliding_window", None)
    if window is not None and getattr(source, "use_sliding_window", True):
        raise InputError(
            f"a model whose attention sees only {window} tokens cannot become a CALM; take one with full "
            "attention."
        )
    if len(tokenizer) > source.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, more than the {source.vocab_size} of the model that "
            "is to become a CALM, whose vocabulary cannot grow; name one of its control tokens as padding."
        )
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise InputError(
            "the tokenizer needs an end-of-text token and another one for padding; set its eos_token and "
            "pad_token."
        )


def _layer_sizes_of(source: PreTrainedConfig) -> dict[str, Any]:
    """The arguments of `LlamaConfig` for the layers of a source; Qwen2 has biases and does not say so."""
    is_qwen = source.model_type == "qwen2"
    other: dict[str, Any] = {"attention_bias": is_qwen, "mlp_bias": False, "head_dim": None}
    sizes: dict[str, Any] = {name: getattr(source, name, other.get(name)) for name in LAYER_SIZES}
    if sizes["head_dim"] is None:
        sizes["head_dim"] = source.hidden_size // source.num_attention_heads
    return LlamaConfig(**sizes).to_dict() | {"attention_dropout": getattr(source, "attention_dropout", 0.0)}


@torch.no_grad()
def _sinks_of(source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    """Key and value of each layer at the first token of a text, its beginning if there is such a token."""
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    read = source(torch.tensor([[token]], device=source.device), use_cache=True, return_dict=True)
    return [
        {"sink_key": layer.keys[0], "sink_value": layer.values[0]} for layer in getattr(read, CACHE).layers
    ]


def _copy_layer(source: nn.Module, layer: nn.Module, sink: dict[str, Tensor]) -> None:
    """Copy the weights of a layer; a bias that the source's does not have is zero."""
    given, weights = {**source.state_dict(), **sink}, layer.state_dict()
    layer.load_state_dict(
        {
            name: given.get(name, torch.zeros_like(weight)) if name.endswith(".bias") else given[name]
            for name, weight in weights.items()
        }
    )
