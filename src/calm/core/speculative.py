"""Speculative sampling: which drafted tokens to accept, so that the text has the model's own distribution.

After Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318), and for token trees:
candidates for a position are drawn without replacement, and each rejected one leaves a residual for the next
(Chen et al., arXiv 2402.12374, after Miao et al., arXiv 2305.09781).

Both rules walk down the tree from its root as long as they accept a child. They request distributions only
at the nodes they visit. Shapes: V vocabulary, C candidates.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calm.core.branches import TEXT, Branches


class Accepted(NamedTuple):
    """The part of a draft that the model accepts.

    Args:
        nodes: The accepted tokens as nodes of the draft, along one path from the root.
        next_token: The model's own token after them.
    """

    nodes: Sequence[int]
    next_token: int


def accept_by_ratio(
    draft: Branches,
    model_at: Callable[[int], Tensor],
    draft_at: Callable[[int], Tensor],
    generator: torch.Generator | None = None,
) -> Accepted:
    """Accept a token with probability min(1, p / q); after a rejection, sample from the residual.

    The text then has distribution p, whatever q is: see `Residual`.

    Args:
        draft: Tokens sampled from q, siblings without replacement and in the order they were drawn.
        model_at: The model's distribution p after the token of a node, (V,).
        draft_at: The draft's distribution q there, (V,) or of another vocabulary size; called only where
            a drafted token follows.
        generator: Source of randomness.
    """
    accepted: list[int] = []
    while True:
        node = accepted[-1] if accepted else TEXT
        candidates = draft.children.get(node, ())
        model_V = model_at(node)
        if not candidates:
            return Accepted(accepted, draw_token(model_V, generator))
        residual = Residual(model_V, draft_at(node))
        for candidate in candidates:
            token = draft.tokens_G[candidate]
            if _happens(residual.acceptance(token), model_V.device, generator):
                accepted.append(candidate)
                break
            residual.reject(token)
        else:
            return Accepted(accepted, draw_token(residual.model_V, generator))


def accept_by_match(draft: Branches, choice_at: Callable[[int], int]) -> Accepted:
    """Accept tokens as long as the model chooses the same ones, then take its own.

    The model chooses each token given those before it, so the accepted tokens and its own are what it would
    have generated alone. This needs only the draft's tokens, not their probabilities.

    Args:
        draft: The drafted tokens.
        choice_at: The model's choice after the token of a node, sampled or greedy.
    """
    accepted: list[int] = []
    while True:
        node = accepted[-1] if accepted else TEXT
        chosen = choice_at(node)
        matches = (child for child in draft.children.get(node, ()) if draft.tokens_G[child] == chosen)
        match = next(matches, None)
        if match is None:
            return Accepted(accepted, chosen)
        accepted.append(match)


class Residual:
    """The residual of a model's distribution p as candidates sampled from q are rejected.

    A candidate x is accepted with probability min(1, p(x) / q(x)). So each token is drawn and accepted with
    probability min(p, q), and the missing mass is (p - q)+, which, normalized, is p for the next candidate;
    that one is sampled from q without x. By induction, the first accepted candidate, or else a sample from
    the residual, has the original distribution p, for any number of candidates.

    Args:
        model_V: p.
        draft_V: q, over the draft's own vocabulary; tokens that it lacks have probability 0.
    """

    def __init__(self, model_V: Tensor, draft_V: Tensor) -> None:
        self.model_V, self._draft_V = model_V, draft_V

    def acceptance(self, token: int) -> float:
        """Probability of accepting a candidate."""
        if token >= len(self.model_V):
            return 0.0
        p, q = float(self.model_V[token]), float(self._draft_V[token])
        return 1.0 if p >= q > 0 else p / q if q > 0 else 0.0

    def reject(self, token: int) -> None:
        """Update p and q after a candidate is rejected."""
        size = len(self.model_V)
        draft_V = torch.nn.functional.pad(self._draft_V[:size], (0, max(0, size - len(self._draft_V))))
        missing_V = (self.model_V - draft_V).clamp_min(0)
        # Equal distributions reject only through rounding, which may leave no residual.
        if (missing := missing_V.sum()) > 0:
            self.model_V = missing_V / missing
        remaining_V = self._draft_V.clone()
        remaining_V[token] = 0
        # Nothing remains once every token that the draft can sample is rejected.
        self._draft_V = remaining_V / remaining_V.sum().clamp_min(torch.finfo(remaining_V.dtype).tiny)


def draw_token(weights_V: Tensor, generator: torch.Generator | None = None) -> int:
    """Sample a token with probability proportional to its weight.

    Raises:
        ValueError: If the weights are not finite, or all 0.
    """
    sums_V = weights_V.cumsum(-1)
    total = float(sums_V[-1])
    if not 0 < total < float("inf"):
        raise ValueError(f"there is no distribution to draw from: its weights sum to {total:g}.")
    # One uniform number and a cumulative sum; `torch.multinomial` draws a number for each token.
    point = _uniform(weights_V.device, generator) * total
    token = int(torch.searchsorted(sums_V, point, right=True))
    return min(token, len(sums_V) - 1)  # Rounding may put the point at the end of the sums.


def draw_distinct(weights_MV: Tensor, number: int, generator: torch.Generator | None = None) -> Tensor:
    """Sample tokens of each row without replacement, (M, C), in the order of the draws.

    Args:
        weights_MV: Each draw is proportional to these, among the tokens that are left.
        number: Number of draws C. Draws after all tokens with a weight are used up are arbitrary.
        generator: Source of randomness.
    """
    left_MV, drawn = weights_MV.clone(), list[Tensor]()
    for _ in range(number):
        sums_MV = left_MV.cumsum(-1)
        uniform_M1 = torch.rand(
            len(left_MV), 1, generator=generator, device=left_MV.device, dtype=left_MV.dtype
        )
        token_M1 = torch.searchsorted(sums_MV, uniform_M1 * sums_MV[:, -1:], right=True)
        token_M1 = token_M1.clamp_max(left_MV.shape[1] - 1)
        drawn.append(token_M1)
        left_MV.scatter_(1, token_M1, 0)
    return torch.cat(drawn, dim=1)


def _happens(probability: float, device: torch.device, generator: torch.Generator | None) -> bool:
    # Strictly less: a uniform number may be 0, and a probability of 0 must never happen.
    return _uniform(device, generator) < probability


def _uniform(device: torch.device, generator: torch.Generator | None) -> float:
    return float(torch.rand((), generator=generator, device=device))
