"""Everything that chance could do, one case after the other, each with its probability."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from calm.core import speculative


class Worlds:
    """Puts every outcome in the place of a draw.

    A function is run once for each way that its draws may come out; those that cannot are left out.
    """

    def __init__(self) -> None:
        self._script: list[int] = []  # Which outcome each draw has in this run,
        self._open: list[int] = []  # and how many follow it.
        self._probability, self._next = 1.0, 0

    def choose(self, outcomes: Sequence[tuple[Any, float]]) -> Any:
        """What a draw comes to in this run.

        Args:
            outcomes: What it may come to, and how likely that is.
        """
        possible = [one for one in outcomes if one[1] > 0]
        if self._next == len(self._script):
            self._script.append(0)
            self._open.append(len(possible) - 1)
        outcome, share = possible[self._script[self._next]]
        self._next += 1
        self._probability *= share
        return outcome

    def of(self, run: Callable[[], Any]) -> Iterator[tuple[Any, float]]:
        """What a function comes to in each run, and how likely that is."""
        while True:
            self._probability, self._next = 1.0, 0
            outcome = run()
            yield outcome, self._probability
            while self._open and self._open[-1] == 0:
                self._open.pop()
                self._script.pop()
            if not self._open:
                return
            self._open[-1] -= 1
            self._script[-1] += 1

    def happens(self, probability: float, *_: Any) -> bool:
        """In the place of a number that is compared with a probability."""
        return bool(self.choose([(True, probability), (False, 1 - probability)]))

    def token(self, weights_V: Tensor, *_: Any) -> int:
        """In the place of `draw_token`."""
        return int(self.choose(list(enumerate((weights_V / weights_V.sum()).tolist()))))

    def distinct(self, weights_MV: Tensor, number: int, *_: Any) -> Tensor:
        """In the place of `draw_distinct`."""
        rows = [self.choose(draws_without_replacement(row_V.tolist(), number)) for row_V in weights_MV]
        return torch.tensor(rows)

    def patch(self, monkeypatch: Any, *modules: Any) -> None:
        """Put these in their places, in the modules that have them."""
        for module in (speculative, *modules):
            for name, mine in (
                ("_happens", self.happens),
                ("draw_token", self.token),
                ("draw_distinct", self.distinct),
            ):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, mine)


def draws_without_replacement(weights: Sequence[float], number: int) -> list[tuple[tuple[int, ...], float]]:
    """Ordered draws of distinct tokens, and how likely each is."""
    found = []
    for tokens in permutations(range(len(weights)), number):
        left, share = sum(weights), 1.0
        for token in tokens:
            share *= weights[token] / left if left > 0 else 0.0
            left -= weights[token]
        found.append((tokens, share))
    return found


def distribution_of_outcomes(
    worlds: Worlds, run: Callable[[], tuple[int, ...]]
) -> dict[tuple[int, ...], float]:
    """How likely each outcome of a function is, tokens that it writes."""
    found: dict[tuple[int, ...], float] = {}
    for tokens, share in worlds.of(run):
        found[tokens] = found.get(tokens, 0.0) + share
    assert abs(sum(found.values()) - 1) < 1e-6
    return found


def largest_error(
    outcomes: Mapping[tuple[int, ...], float], next_of: Callable[[tuple[int, ...]], Tensor]
) -> float:
    """How far the distribution of the next token is from the right one, behind any beginning of an outcome.

    Args:
        outcomes: How likely new texts are, of any lengths.
        next_of: The right distribution behind some new tokens, (V,).
    """
    worst = 0.0
    for length in range(1, max(len(tokens) for tokens in outcomes) + 1):
        shares: dict[tuple[int, ...], float] = {}
        for tokens, share in outcomes.items():
            if len(tokens) >= length:
                shares[tokens[:length]] = shares.get(tokens[:length], 0.0) + share
        for before in {tokens[:-1] for tokens in shares}:
            right_V = next_of(before).double()
            own_V = right_V.new_tensor([shares.get((*before, token), 0.0) for token in range(len(right_V))])
            worst = max(worst, float((own_V / own_V.sum() - right_V).abs().max()))
    return worst
