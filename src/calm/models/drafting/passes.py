"""Forward passes of the target model over one text and a draft, and rollback of rejected tokens.

Shapes: G drafted tokens, S tokens that are read in a pass, T tokens read before, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from calm.core.branches import Branches
from calm.models.caches import CACHE

_NO_BRANCHES = Branches()


class TextPasses:
    """Forward passes over one text, with a cache of what has been read.

    Args:
        model: A causal language model of transformers that passes `check_model`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, config = model, model.config.get_text_config(decoder=True)
        self._cache = DynamicCache(config=config)
        self._attention = config._attn_implementation
        names = _argument_names(model)
        self._takes_logits_to_keep, self._takes_positions = "logits_to_keep" in names, "position_ids" in names
        self.takes_branches = takes_branches(model)

    def __len__(self) -> int:
        """Number of tokens that have been read."""
        return self._cache.get_seq_length()

    def read(self, tokens: Sequence[int], branches: Branches = _NO_BRANCHES) -> Tensor:
        """Read more tokens, and a draft after them.

        Args:
            tokens: At least one.
            branches: The draft; a single path, unless the model takes trees.

        Returns:
            Logits (1 + G, V) of the token after the last one, and after each drafted token.
        """
        device, start, end = self._model.device, len(self), len(self) + len(tokens)
        ids_1S = torch.tensor([[*tokens, *branches.tokens_G]], device=device)
        num_logits = 1 + len(branches)
        arguments: dict[str, Any] = {"use_cache": True, CACHE: self._cache}
        if self._takes_logits_to_keep:
            arguments["logits_to_keep"] = num_logits
        if self._takes_positions:  # As `generate` passes them, whatever a model's default would be.
            positions = [*range(start, end), *(end + depth for depth in branches.depths)]
            arguments["position_ids"] = torch.tensor([positions], device=device)
        if not branches.is_line:
            arguments["attention_mask"] = self._mask(len(tokens), branches).to(device)
        logits_1SV: Tensor = self._model(ids_1S, **arguments).logits
        return logits_1SV[0, -num_logits:]

    def roll_back(self, number: int, keep: Sequence[int] = ()) -> None:
        """Remove the last positions from the cache, but for those of accepted tokens.

        Args:
            number: How many positions.
            keep: Which of these to keep, counted from 0, in increasing order.
        """
        if list(keep) != list(range(len(keep))):
            start = len(self) - number
            layers: Any = self._cache.layers
            for layer in layers:
                for states in (layer.keys, layer.values):
                    index = torch.tensor(keep, device=states.device) + start
                    states[..., start : start + len(keep), :] = states[..., index, :]
        if number > len(keep):
            self._cache.crop(len(keep) - number)

    def _mask(self, num_tokens: int, branches: Branches) -> Tensor:
        """Attention mask (1, 1, S, T + S): causal, and inside the draft each token sees only its ancestors.

        Args:
            num_tokens: Tokens that are read before the draft.
            branches: The draft.
        """
        start, size = len(self), num_tokens + len(branches)
        is_seen = torch.ones(size, start + size, dtype=torch.bool).tril(start)
        is_seen[num_tokens:, start + num_tokens :] = branches.sees()
        if self._attention == "sdpa":
            return is_seen[None, None]
        dtype = self._model.dtype  # "eager" adds the mask to the attention scores.
        mask = torch.zeros(is_seen.shape, dtype=dtype).masked_fill(~is_seen, torch.finfo(dtype).min)
        return mask[None, None]


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose cache cannot be rolled back to the accepted tokens."""
    name = type(model).__name__
    if model.config.is_encoder_decoder or not model.can_generate() or model._is_stateful:
        raise ValueError(f"a draft needs a causal language model with attention, not a {name}.")
    if CACHE not in _argument_names(model):
        raise ValueError(f"a {name} has no KV cache, so it cannot be used with a draft.")
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    if any(type(layer) is not DynamicLayer for layer in layers):
        raise ValueError(
            f"a {name} with these settings discards old tokens, so its cache cannot be rolled back; use it "
            "without a draft."
        )


def takes_branches(model: PreTrainedModel) -> bool:
    """Whether a model reads a draft tree as it would read each of its paths."""
    config = model.config.get_text_config(decoder=True)
    # Attention behind transformers' interface uses the mask and positions that it is given; other kinds may
    # count positions themselves, as local attention and linear biases do. Flash attention takes no mask.
    uses_mask = model._supports_attention_backend and config._attn_implementation in ("eager", "sdpa")
    return uses_mask and "position_ids" in _argument_names(model)


def _argument_names(model: PreTrainedModel) -> set[str]:
    """Argument names of a model's forward pass, including those that a class passes on to its parent."""
    forwards = [vars(base)["forward"] for base in type(model).__mro__ if "forward" in vars(base)]
    return {name for forward in forwards for name in inspect.signature(forward).parameters}
