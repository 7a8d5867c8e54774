"""Speculative sampling: which drafted tokens a model accepts, so that its text has its own distribution.

After Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318), for token trees as well:
candidates for a place are drawn without replacement, and each that is rejected leaves a residual for the next
(Chen et al., arXiv 2402.12374, after Miao et al., arXiv 2305.09781).

Both rules walk the tree from its root for as long as they accept a child. They ask for a distribution at
nodes that they visit, and nowhere else. Shapes: V vocabulary, C candidates.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calm.core.branches import TEXT, Branches


class Accepted(NamedTuple):
    """What a model accepts of a draft.

    Args:
        places: The accepted tokens, each of which follows the one before.
        next_token: The model's own token after them.
    """

    places: Sequence[int]
    next_token: int


def accept_by_ratio(
    draft: Branches,
    model_at: Callable[[int], Tensor],
    draft_at: Callable[[int], Tensor],
    generator: torch.Generator | None = None,
) -> Accepted:
    """Accept a token with probability min(1, p / q); after a rejection, sample from the residual.

    Then the text has distribution p, whatever q is: see `Residual`.

    Args:
        draft: Tokens drawn from q, at each place without replacement, in the order of the draws.
        model_at: The model's distribution p after the token at a place, (V,).
        draft_at: The draft's q of the same token, (V,) or of another number of tokens; asked for only where
            a drafted token follows.
        generator: Source of randomness.
    """
    accepted: list[int] = []
    while True:
        place = accepted[-1] if accepted else TEXT
        candidates = draft.children.get(place, ())
        model_V = model_at(place)
        if not candidates:
            return Accepted(accepted, draw_token(model_V, generator))
        residual = Residual(model_V, draft_at(place))
        for candidate in candidates:
            token = draft.tokens_G[candidate]
            if _happens(residual.acceptance(token), model_V.device, generator):
                accepted.append(candidate)
                break
            residual.reject(token)
        else:
            return Accepted(accepted, draw_token(residual.model_V, generator))


def accept_by_match(draft: Branches, choice_at: Callable[[int], int]) -> Accepted:
    """Accept tokens for as long as the model chooses the same itself, and then take its own.

    The model chooses each token given those before it, so the accepted ones and its own are what it would
    have written. This needs nothing of the draft but its tokens.

    Args:
        draft: The tokens.
        choice_at: What the model chooses after the token at a place, by a draw or as its likeliest.
    """
    accepted: list[int] = []
    while True:
        place = accepted[-1] if accepted else TEXT
        chosen = choice_at(place)
        same = [one for one in draft.children.get(place, ()) if draft.tokens_G[one] == chosen]
        if not same:
            return Accepted(accepted, chosen)
        accepted.append(same[0])


class Residual:
    """The residual of a model's distribution p as candidates that were drawn from q are rejected.

    A candidate x is accepted with probability min(1, p(x) / q(x)). So each token is drawn and accepted with
    probability min(p, q), and what p still lacks is (p - q)+, which brought to a sum of 1 is p for the next
    candidate; that one comes from q without x. By induction the first that is accepted, or else a draw from
    the residual, has the p of the beginning, for any number of candidates.

    Args:
        model_V: p.
        draft_V: q, of the draft's own number of tokens: those that it lacks have no probability.
    """

    def __init__(self, model_V: Tensor, draft_V: Tensor) -> None:
        self.model_V, self._draft_V = model_V, draft_V

    def acceptance(self, token: int) -> float:
        """The probability with which a candidate is accepted."""
        if token >= len(self.model_V):
            return 0.0
        p, q = float(self.model_V[token]), float(self._draft_V[token])
        return 1.0 if p >= q > 0 else p / q if q > 0 else 0.0

    def reject(self, token: int) -> None:
        """Go on without a candidate."""
        size = len(self.model_V)
        draft_V = torch.nn.functional.pad(self._draft_V[:size], (0, max(0, size - len(self._draft_V))))
        missing_V = (self.model_V - draft_V).clamp_min(0)
        # Equal distributions reject nothing but by rounding, which may leave no residual.
        if (missing := missing_V.sum()) > 0:
            self.model_V = missing_V / missing
        others_V = self._draft_V.clone()
        others_V[token] = 0
        # Nothing is left where all that the draft can say is rejected.
        self._draft_V = others_V / others_V.sum().clamp_min(torch.finfo(others_V.dtype).tiny)


def draw_token(weights_V: Tensor, generator: torch.Generator | None = None) -> int:
    """A token with a probability in proportion to its weight.

    Raises:
        ValueError: If the weights are not finite, or all 0.
    """
    sums_V = weights_V.cumsum(-1)
    total = float(sums_V[-1])
    if not 0 < total < float("inf"):
        raise ValueError(f"there is no distribution to draw from: the sum of its weights is {total:g}.")
    # One uniform number and a running sum; `torch.multinomial` draws a number for each token.
    point = _uniform(weights_V.device, generator) * total
    found = int(torch.searchsorted(sums_V, point, right=True))
    return min(found, len(sums_V) - 1)


def draw_distinct(weights_MV: Tensor, number: int, generator: torch.Generator | None = None) -> Tensor:
    """Tokens of each row, (M, C), drawn without replacement, in the order of the draws.

    Args:
        weights_MV: In proportion to these, at each draw among the tokens that are left.
        number: Number of draws C. Where no more tokens have a weight, what is drawn means nothing.
        generator: Source of randomness.
    """
    left_MV, drawn = weights_MV.clone(), list[Tensor]()
    for _ in range(number):
        sums_MV = left_MV.cumsum(-1)
        uniform_M1 = torch.rand(
            len(left_MV), 1, generator=generator, device=left_MV.device, dtype=left_MV.dtype
        )
        found_M1 = torch.searchsorted(sums_MV, uniform_M1 * sums_MV[:, -1:], right=True)
        drawn.append(found_M1.clamp_max(left_MV.shape[1] - 1))
        left_MV.scatter_(1, drawn[-1], 0)
    return torch.cat(drawn, dim=1)


def _happens(probability: float, device: torch.device, generator: torch.Generator | None) -> bool:
    # A uniform number may be 0, which is not less than a probability of 0.
    return _uniform(device, generator) < probability


def _uniform(device: torch.device, generator: torch.Generator | None) -> float:
    return float(torch.rand((), generator=generator, device=device))
