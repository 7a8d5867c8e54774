"""A text that one model writes and another drafts, round by round.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from calm.core.branches import TEXT
from calm.core.speculative import Accepted, accept_by_match, accept_by_ratio, draw_token
from calm.models.drafting.draft import ChunkDrafter, Draft
from calm.models.drafting.passes import TextPasses


@dataclass
class DraftCounts:
    """What drafts came to.

    Args:
        rounds: Passes of the model that decides.
        drafted: Tokens that were drafted, of each draft those of its longest way.
        accepted: Drafted tokens that stayed; each round adds one of the model's own.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


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
        self._passes, self._drafter = TextPasses(model), drafter
        self._processors = LogitsProcessorList() if processors is None else processors
        self._is_greedy, self._generator = is_greedy, generator
        text_T = ids_1T[0] if mask_1T is None else ids_1T[0, mask_1T[0].bool()]
        self._text: list[int] = text_T.tolist()
        self._vocab_size: int = model.config.get_text_config(decoder=True).vocab_size

    @torch.no_grad()
    def read_ahead(self, most: int) -> bool:
        """Read a piece of the text if it is long; whether the rest is short enough for a round.

        Args:
            most: Tokens of a piece.
        """
        first = len(self._passes)
        if len(self._text) - first <= most:
            return self._drafter.read_ahead(self._text, most)
        self._passes.read(self._text[first : first + most])
        return False

    @torch.no_grad()
    def round(self, most: int) -> list[int]:
        """New tokens: those of a draft that the model keeps, and one of its own.

        Args:
            most: How many there may be, at least 1.
        """
        draft = self._drafter.draft(self._text, most - 1, self._generator, self._passes.takes_branches)
        branches = draft.branches
        # A token that the model does not have is never accepted, nor what follows it.
        row_of = {TEXT: 0}
        for place, (token, parent) in enumerate(zip(branches.tokens_G, branches.parents_G, strict=True)):
            if token < self._vocab_size and parent in row_of:
                row_of[place] = len(row_of)
        _, *places = row_of
        scores_SV = self._passes.read(self._text[len(self._passes) :], branches.part(places))

        def scores_at(place: int) -> Tensor:
            scores_1V = scores_SV[row_of[place]].unsqueeze(0).float()
            return self._processed(scores_1V, branches.tokens_to(place))

        accepted = self._decide(draft, scores_at)
        self._passes.roll_back(len(places), [row_of[place] - 1 for place in accepted.places])
        new = [*(branches.tokens_G[place] for place in accepted.places), accepted.next_token]
        self._text += new
        self.ids_1T = torch.cat([self.ids_1T, self.ids_1T.new_tensor([new])], dim=1)
        self.counts.rounds += 1
        self.counts.drafted += branches.longest
        self.counts.accepted += len(accepted.places)
        return new

    def _processed(self, scores_1V: Tensor, drafted: list[int]) -> Tensor:
        """Scores behind the text and some drafted tokens, as processors make them."""
        if not self._processors:
            return scores_1V
        before_1T = torch.cat([self.ids_1T, self.ids_1T.new_tensor([drafted])], dim=1)
        return self._processors(before_1T, scores_1V)  # type: ignore[arg-type]

    def _decide(self, draft: Draft, scores_at: Callable[[int], Tensor]) -> Accepted:
        if self._is_greedy:
            return accept_by_match(draft.branches, lambda place: int(scores_at(place).argmax()))

        def model_at(place: int) -> Tensor:
            return scores_at(place)[0].softmax(-1)

        if draft.distribution_at is not None:
            return accept_by_ratio(draft.branches, model_at, draft.distribution_at, self._generator)
        return accept_by_match(draft.branches, lambda place: draw_token(model_at(place), self._generator))
