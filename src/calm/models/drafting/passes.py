"""Forward passes of the target model over one text and a draft, and rollback of rejected tokens.

Shapes: G drafted tokens, S positions that are read, T tokens, V vocabulary.
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
    """What a model has read of one text.

    Args:
        model: A causal language model of transformers that passes `check_model`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, config = model, model.config.get_text_config(decoder=True)
        self._cache = DynamicCache(config=config)
        self._attention = config._attn_implementation
        taken = _arguments(model)
        self._takes_last, self._takes_positions = "logits_to_keep" in taken, "position_ids" in taken
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
        device, first, last = self._model.device, len(self), len(self) + len(tokens)
        ids_1S = torch.tensor([[*tokens, *branches.tokens_G]], device=device)
        num_places = 1 + len(branches)
        more: dict[str, Any] = {"logits_to_keep": num_places} if self._takes_last else {}
        if self._takes_positions:  # As `generate` passes them, whatever a model's default would be.
            position_S = [*range(first, last), *(last + depth for depth in branches.depths)]
            more["position_ids"] = torch.tensor([position_S], device=device)
        if not branches.is_line:
            more["attention_mask"] = self._mask(len(tokens), branches).to(device)
        scores_1SV: Tensor = self._model(ids_1S, use_cache=True, **{CACHE: self._cache}, **more).logits
        return scores_1SV[0, -num_places:]

    def roll_back(self, number: int, but: Sequence[int] = ()) -> None:
        """Remove the last positions from the cache.

        Args:
            number: How many positions.
            but: Which of these to keep, counted from 0; each follows the one before, as on a path.
        """
        if list(but) != list(range(len(but))):
            first = len(self) - number
            layers: Any = self._cache.layers
            for states in (states for layer in layers for states in (layer.keys, layer.values)):
                kept_K = torch.tensor(but, device=states.device) + first
                states[..., first : first + len(but), :] = states[..., kept_K, :]
        if number > len(but):
            self._cache.crop(len(but) - number)

    def _mask(self, number: int, branches: Branches) -> Tensor:
        """Attention mask (1, 1, S, T + S): causal, and inside the draft each token sees its ancestors.

        Args:
            number: Tokens before the draft.
            branches: The draft.
        """
        first, size = len(self), number + len(branches)
        sees = torch.ones(size, first + size, dtype=torch.bool).tril(first)
        sees[number:, first + number :] = branches.sees()
        if self._attention == "sdpa":
            return sees[None, None]
        dtype = self._model.dtype  # "eager" adds the mask to its scores.
        return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[None, None]


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose cache cannot be rolled back to the accepted tokens."""
    name = type(model).__name__
    if model.config.is_encoder_decoder or not model.can_generate() or model._is_stateful:
        raise ValueError(f"a draft needs a causal language model with attention, not a {name}.")
    if CACHE not in _arguments(model):
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
    is_plain = model._supports_attention_backend and config._attn_implementation in ("eager", "sdpa")
    return is_plain and "position_ids" in _arguments(model)


def _arguments(model: PreTrainedModel) -> set[str]:
    """Argument names of a model's forward pass, including those that a class passes on to its parent."""
    passes = [vars(one)["forward"] for one in type(model).__mro__ if "forward" in vars(one)]
    return {name for one in passes for name in inspect.signature(one).parameters}
