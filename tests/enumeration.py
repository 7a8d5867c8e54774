"""Enumerates everything that random draws could come to, each outcome with its probability."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from calm.core import speculative


class OutcomeEnumerator:
    """Replaces random draws by each of their outcomes in turn.

    A function is run once for each combination of outcomes of its draws; impossible ones are left out.
    """

    def __init__(self) -> None:
        # For each draw of the current run: the index of its outcome, and how many outcomes are still to come.
        self._indices: list[int] = []
        self._remaining: list[int] = []
        self._probability, self._next = 1.0, 0

    def choose(self, outcomes: Sequence[tuple[Any, float]]) -> Any:
        """The outcome of a draw in this run.

        Args:
            outcomes: Possible outcomes and their probabilities.
        """
        possible = [(outcome, share) for outcome, share in outcomes if share > 0]
        if self._next == len(self._indices):
            self._indices.append(0)
            self._remaining.append(len(possible) - 1)
        outcome, share = possible[self._indices[self._next]]
        self._next += 1
        self._probability *= share
        return outcome

    def results_of(self, run: Callable[[], Any]) -> Iterator[tuple[Any, float]]:
        """The result of a function in each run, and the probability of that run."""
        while True:
            self._probability, self._next = 1.0, 0
            result = run()
            yield result, self._probability
            while self._remaining and self._remaining[-1] == 0:
                self._remaining.pop()
                self._indices.pop()
            if not self._remaining:
                return
            self._remaining[-1] -= 1
            self._indices[-1] += 1

    def happens(self, probability: float, *_: Any) -> bool:
        """Replaces the comparison of a random number with a probability."""
        return bool(self.choose([(True, probability), (False, 1 - probability)]))

    def token(self, weights_V: Tensor, *_: Any) -> int:
        """Replaces `draw_token`."""
        return int(self.choose(list(enumerate((weights_V / weights_V.sum()).tolist()))))

    def distinct(self, weights_MV: Tensor, number: int, *_: Any) -> Tensor:
        """Replaces `draw_distinct`."""
        rows = [self.choose(draws_without_replacement(row_V.tolist(), number)) for row_V in weights_MV]
        return torch.tensor(rows)

    def patch(self, monkeypatch: Any, *modules: Any) -> None:
        """Replace the random functions of `calm.core.speculative`, and of modules that import them."""
        for module in (speculative, *modules):
            for name, replacement in (
                ("_happens", self.happens),
                ("draw_token", self.token),
                ("draw_distinct", self.distinct),
            ):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, replacement)


def draws_without_replacement(weights: Sequence[float], number: int) -> list[tuple[tuple[int, ...], float]]:
    """Ordered draws of distinct tokens, and their probabilities."""
    draws = []
    for tokens in permutations(range(len(weights)), number):
        left, share = sum(weights), 1.0
        for token in tokens:
            share *= weights[token] / left if left > 0 else 0.0
            left -= weights[token]
        draws.append((tokens, share))
    return draws


def distribution_of_outcomes(
    enumerator: OutcomeEnumerator, run: Callable[[], tuple[int, ...]]
) -> dict[tuple[int, ...], float]:
    """The probability of each sequence of tokens that a function can return."""
    distribution: dict[tuple[int, ...], float] = {}
    for tokens, share in enumerator.results_of(run):
        distribution[tokens] = distribution.get(tokens, 0.0) + share
    assert abs(sum(distribution.values()) - 1) < 1e-6
    return distribution


def largest_error(
    outcomes: Mapping[tuple[int, ...], float], next_of: Callable[[tuple[int, ...]], Tensor]
) -> float:
    """The largest error of any conditional probability of a next token, after any prefix of an outcome.

    Args:
        outcomes: Probabilities of new texts, of any lengths.
        next_of: The right distribution after some new tokens, (V,).
    """
    worst = 0.0
    for length in range(1, max(len(tokens) for tokens in outcomes) + 1):
        shares: dict[tuple[int, ...], float] = {}
        for tokens, share in outcomes.items():
            if len(tokens) >= length:
                shares[tokens[:length]] = shares.get(tokens[:length], 0.0) + share
        for prefix in {tokens[:-1] for tokens in shares}:
            expected_V = next_of(prefix).double()
            actual_V = expected_V.new_tensor(
                [shares.get((*prefix, token), 0.0) for token in range(len(expected_V))]
            )
            worst = max(worst, float((actual_V / actual_V.sum() - expected_V).abs().max()))
    return worst
