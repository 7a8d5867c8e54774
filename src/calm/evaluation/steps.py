"""Scorers that step through a window unit by unit, from draws alone or from the model's probabilities.

Shapes: P targets, N draws, S steps of a window, K tokens of a step, X size of the reader's output for a unit.
"""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from calm.core.brier import share_of_equal_pairs, share_of_hits, window_of, windows_of_steps
from calm.core.chunks import is_after_eos
from calm.evaluation.branches import read_text
from calm.evaluation.brier import Targets
from calm.evaluation.processes import Batch
from calm.models.readers import LikelihoodReader, Reader


@dataclass
class _Step(abc.ABC):
    """Estimates from one step of all targets.

    Args:
        reader: The model.
        outputs_PX: Its output before the step, one per target.
        has_ended_P: Whether the text has ended; only padding follows then.
        targets: The targets.
        num_draws: Draws per target.
        generator: Source of randomness.
    """

    reader: Any
    outputs_PX: Tensor
    has_ended_P: Tensor
    targets: Targets
    num_draws: int
    generator: torch.Generator

    def __post_init__(self) -> None:
        """Compute what `hits` and `path` share, if anything."""
        return

    @abc.abstractmethod
    def hits(self, truth_PK: Tensor) -> Tensor:
        """Unbiased estimates of P(first n tokens of the truth), n = 1..K, (P, K)."""

    @abc.abstractmethod
    def path(self) -> tuple[Tensor, Tensor, Tensor]:
        """A chunk that the model generates, (P, K), and two estimates.

        Those are of sum_x P(x)^2 over the first n tokens, (P, K), and of the chunk's probability, (P,).
        """


class _DrawnStep(_Step):
    """Estimates from draws alone."""

    def __post_init__(self) -> None:
        draws_NPK, _ = self.targets.end(self.reader.draw(self.outputs_PX, self.num_draws, self.generator))
        pad = self.targets.pad_token_id
        self.draws_NPK = torch.where(self.has_ended_P.unsqueeze(-1), pad, draws_NPK)

    def hits(self, truth_PK: Tensor) -> Tensor:
        return share_of_hits(self.draws_NPK, truth_PK)

    def path(self) -> tuple[Tensor, Tensor, Tensor]:
        path_PK = self.draws_NPK[0]
        follows_P = (self.draws_NPK[1:] == path_PK).all(-1).float().mean(0)
        return path_PK, share_of_equal_pairs(self.draws_NPK), follows_P


class _ExactStep(_Step):
    """Estimates from the model's probabilities."""

    def hits(self, truth_PK: Tensor) -> Tensor:
        return self._probabilities(truth_PK)[0]

    def path(self) -> tuple[Tensor, Tensor, Tensor]:
        path_PK = self.reader.draw(self.outputs_PX, 1, self.generator)[0]
        p_PK, equal_PK = self._probabilities(path_PK)
        return path_PK, equal_PK, p_PK[:, -1]

    def _probabilities(self, units_PK: Tensor) -> tuple[Tensor, Tensor]:
        """P(first n tokens), and P(first n - 1) times the probability that two draws of token n agree.

        After the end of a text there is only padding, with probability 1. Both (P, K).
        """
        token_PK, equal_PK = self.reader.probabilities(self.outputs_PX, units_PK)
        is_padding_PK = self.has_ended_P.unsqueeze(-1) | is_after_eos(units_PK, self.targets.eos_ids)
        token_PK, equal_PK = (
            token_PK.masked_fill(is_padding_PK, 1.0),
            equal_PK.masked_fill(is_padding_PK, 1.0),
        )
        p_PK = token_PK.cumprod(-1)
        before_PK = torch.cat([torch.ones_like(p_PK[:, :1]), p_PK[:, :-1]], dim=-1)
        return p_PK, before_PK * equal_PK


class _StepScorer:
    """Accuracy under teacher forcing, collisions along one path that the model generates."""

    _step: ClassVar[type[_Step]]

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.chunk_size = window_of(reader.unit_size)

    def estimate(
        self, batch: Batch, targets: Targets, num_draws: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """See `calm.evaluation.brier.Scorer`."""
        text = read_text(self.reader, batch, targets.is_target_BC, self.chunk_size)
        truth_SPK = targets.chunks_PK.unflatten(1, (text.num_steps, -1)).transpose(0, 1)
        truth_ended_P = path_ended_P = torch.zeros_like(targets.chunks_PK[:, 0], dtype=torch.bool)
        settings = (targets, num_draws, generator)
        hits, equal, follows = [], [], []
        outputs_PX = text.outputs_on_text(0)
        for index, truth_PK in enumerate(truth_SPK):
            step = self._step(self.reader, text.outputs_on_text(index), truth_ended_P, *settings)
            hits.append(step.hits(truth_PK))
            truth_ended_P = truth_ended_P | targets.end(truth_PK)[1]
            if index > 0:  # From here on, the path has left the text.
                step = self._step(self.reader, outputs_PX, path_ended_P, *settings)
            path_PK, equal_PK, follows_P = step.path()
            equal.append(equal_PK)
            follows.append(follows_P)
            path_PK, ends_P = targets.end(path_PK)
            path_ended_P = path_ended_P | ends_P
            if index < text.num_steps - 1:
                outputs_PX = text.follow(path_PK)
        return windows_of_steps(torch.stack(hits), torch.stack(equal), torch.stack(follows))


class DrawScorer(_StepScorer):
    """Scores any reader from draws.

    Args:
        reader: The model.
    """

    _step = _DrawnStep


class ProbabilityScorer(_StepScorer):
    """Scores a reader from its probabilities: the same mean, far less variance.

    Sums over tokens replace draws wherever possible (Rao-Blackwellization): P(y) is the product of the
    true tokens' probabilities; sum_x P(x)^2 of order n is the mean, over paths x that the model generates,
    of P(x_1)...P(x_(n-1)) · sum_v P(v | x_1..x_(n-1))^2. One path is generated per target, whatever the
    number of draws.

    Args:
        reader: The model.
    """

    _step = _ExactStep

    def __init__(self, reader: LikelihoodReader) -> None:
        super().__init__(reader)
