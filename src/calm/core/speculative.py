"""Which of the tokens that another has drafted a model keeps, so that its text has its own distribution.

Speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). Shapes: G drafted
tokens, S places that the model has read: the one before the draft and those of its tokens. V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """What a model makes of a draft.

    Args:
        number: How many of its first tokens stay.
        next_token: The model's own token behind them.
    """

    number: int
    next_token: int


def keep_by_ratio(
    model_SV: Tensor,
    tokens_G: Sequence[int],
    drafted_G: Tensor,
    draft_of: Callable[[int], Tensor],
    generator: torch.Generator | None = None,
) -> Kept:
    """Keep a token with probability min(1, p / q); for the first refused comes a draw of (p - q)+.

    Then what is written has distribution p, whatever q is: a token is kept with probability min(p, q), and
    what is missing of p is what the residual, (p - q)+ brought to a sum of 1, is drawn for.

    Args:
        model_SV: The model's distribution p at each place. S is G + 1, or less where the model could not read
            a token of the draft; that one must have no probability.
        tokens_G: The draft.
        drafted_G: Probability q of each of its tokens, in the draft's own distribution.
        draft_of: Gives that whole distribution, (V,), of one place.
        generator: Source of randomness.
    """
    uniform_G = torch.rand(len(tokens_G), generator=generator, device=model_SV.device)
    for place, token in enumerate(tokens_G):
        p = model_SV[place, token] if token < model_SV.shape[1] else 0.0
        if not uniform_G[place] * drafted_G[place] < p:  # So nothing impossible is kept, not even at 0.
            model_V = model_SV[place]
            draft_V = _fitted(draft_of(place), len(model_V))
            missing_V = (model_V - draft_V).clamp_min(0)
            # Equal distributions refuse nothing but by rounding, which may leave no residual.
            return Kept(place, _drawn(missing_V if missing_V.sum() > 0 else model_V, generator))
    return Kept(len(tokens_G), _drawn(model_SV[len(tokens_G)], generator))


def keep_by_agreement(chosen_S: Sequence[int], tokens_G: Sequence[int]) -> Kept:
    """Keep tokens for as long as they are those that the model has chosen itself, and then its own.

    The model chooses each token given the draft before it, so the first that differs, and all before it, are
    what it would have written. This needs nothing of the draft but its tokens.

    Args:
        chosen_S: What the model has chosen at each place, by a draw or as its likeliest.
        tokens_G: The draft; S is G + 1, or less where the model could not read a token.
    """
    pairs = zip(chosen_S, tokens_G, strict=False)
    number = next((place for place, (own, drafted) in enumerate(pairs) if own != drafted), len(tokens_G))
    return Kept(number, chosen_S[number])


def _drawn(weights_V: Tensor, generator: torch.Generator | None) -> int:
    return int(torch.multinomial(weights_V, 1, generator=generator))


def _fitted(draft_V: Tensor, vocab_size: int) -> Tensor:
    """A distribution over the model's vocabulary: tokens that the draft lacks have no probability."""
    missing = max(0, vocab_size - len(draft_V))
    return torch.nn.functional.pad(draft_V[:vocab_size], (0, missing))
