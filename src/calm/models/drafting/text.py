"""A text that one model writes and another drafts, round by round.

Shapes: G drafted tokens, S places that the model reads, T tokens, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from calm.core.speculative import Kept, keep_by_agreement, keep_by_ratio
from calm.models.caches import CACHE
from calm.models.drafting.draft import ChunkDrafter, Draft


@dataclass
class DraftCounts:
    """What drafts came to.

    Args:
        rounds: Passes of the model that decides.
        drafted: Tokens that were drafted.
        kept: Drafted tokens that stayed; each round adds one of the model's own.
    """

    rounds: int = 0
    drafted: int = 0
    kept: int = 0


class DraftedText:
    """One text.

    Args:
        model: Who decides: a causal language model of transformers for which `check_model` raises nothing.
        drafter: Who drafts.
        ids_1T: The prompt, padded in front or not at all.
        mask_1T: 1 on its tokens; None for all.
        processors: What becomes of the model's scores, as in `generate` of transformers.
        is_greedy: Whether the likeliest token is written instead of a draw.
        generator: Source of randomness for draws and drafts; torch's own where None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: ChunkDrafter,
        ids_1T: Tensor,
        mask_1T: Tensor | None = None,
        processors: LogitsProcessorList | None = None,
        is_greedy: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.ids_1T, self.counts = ids_1T, DraftCounts()
        self._model, self._drafter = model, drafter
        self._processors = LogitsProcessorList() if processors is None else processors
        self._is_greedy, self._generator = is_greedy, generator
        text_T = ids_1T[0] if mask_1T is None else ids_1T[0, mask_1T[0].bool()]
        self._text: list[int] = text_T.tolist()
        self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self._vocab_size: int = model.config.get_text_config(decoder=True).vocab_size
        taken = _arguments(model)
        self._takes_last, self._takes_positions = "logits_to_keep" in taken, "position_ids" in taken

    @torch.no_grad()
    def read_ahead(self, most: int) -> bool:
        """Read a piece of the text if it is long; whether the rest is short enough for a round.

        Args:
            most: Tokens of a piece.
        """
        first = self._cache.get_seq_length()
        if len(self._text) - first <= most:
            return self._drafter.read_ahead(self._text, most)
        self._pass(self._text[first : first + most], 1)
        return False

    @torch.no_grad()
    def round(self, most: int) -> list[int]:
        """New tokens: those of a draft that the model keeps, and one of its own.

        Args:
            most: How many there may be, at least 1.
        """
        draft = self._drafter.draft(self._text, most - 1, self._generator)
        # A token that the model does not have is never kept; its place is still read, and decided.
        readable = list(takewhile(lambda token: token < self._vocab_size, draft.tokens_G))
        scores_SV = self._read(readable)
        kept = self._decide(draft, scores_SV)
        new = [*draft.tokens_G[: kept.number], kept.next_token]
        if refused := len(readable) - kept.number:
            self._cache.crop(-refused)
        self._text += new
        self.ids_1T = torch.cat([self.ids_1T, self.ids_1T.new_tensor([new])], dim=1)
        self.counts.rounds += 1
        self.counts.drafted += len(draft.tokens_G)
        self.counts.kept += kept.number
        return new

    def _read(self, drafted: Sequence[int]) -> Tensor:
        """Scores (S, V) of the next token behind the text, and behind each token of a draft."""
        num_places = len(drafted) + 1
        unread = self._text[self._cache.get_seq_length() :]
        scores_SV = self._pass([*unread, *drafted], num_places).float()
        if not self._processors:
            return scores_SV
        before_1T = torch.cat([self.ids_1T, self.ids_1T.new_tensor([list(drafted)])], dim=1)
        length = self.ids_1T.shape[1]
        # One place after the other, as processors may look at all tokens before it.
        rows = [
            self._processors(before_1T[:, : length + place], scores_SV[place : place + 1])  # type: ignore[arg-type]
            for place in range(num_places)
        ]
        return torch.cat(rows)

    def _pass(self, tokens: Sequence[int], num_places: int) -> Tensor:
        """Read tokens on; scores (S, V) behind the last so many."""
        more: dict[str, Any] = {"logits_to_keep": num_places} if self._takes_last else {}
        ids_1S = self.ids_1T.new_tensor([list(tokens)])
        if self._takes_positions:  # As `generate` gives them, whatever a model's own would be.
            first = self._cache.get_seq_length()
            more["position_ids"] = torch.arange(first, first + len(tokens), device=ids_1S.device).unsqueeze(0)
        scores_1SV: Tensor = self._model(ids_1S, use_cache=True, **{CACHE: self._cache}, **more).logits
        return scores_1SV[0, -num_places:]

    def _decide(self, draft: Draft, scores_SV: Tensor) -> Kept:
        if self._is_greedy:
            return keep_by_agreement(scores_SV.argmax(-1).tolist(), draft.tokens_G)
        model_SV = scores_SV.softmax(-1)
        if draft.drafted_G is not None and draft.distribution is not None:
            return keep_by_ratio(
                model_SV, draft.tokens_G, draft.drafted_G, draft.distribution, self._generator
            )
        drawn_S1 = torch.multinomial(model_SV, 1, generator=self._generator)
        return keep_by_agreement(drawn_S1.flatten().tolist(), draft.tokens_G)


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose cache cannot be cut back to what is kept of a draft."""
    name = type(model).__name__
    if model.config.is_encoder_decoder or not model.can_generate() or model._is_stateful:
        raise ValueError(f"a draft is for causal language models with attention, not for a {name}.")
    if CACHE not in _arguments(model):
        raise ValueError(f"a {name} remembers nothing of what it has read, so a draft does not go with it.")
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    if any(type(layer) is not DynamicLayer for layer in layers):
        raise ValueError(
            f"a {name} with these settings forgets old tokens, so it cannot take back a draft; leave it out."
        )


def _arguments(model: PreTrainedModel) -> set[str]:
    """What a pass of a model takes by name; what a class hands on to its parent included."""
    passes = [vars(one)["forward"] for one in type(model).__mro__ if "forward" in vars(one)]
    return {name for one in passes for name in inspect.signature(one).parameters}
