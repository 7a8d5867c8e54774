"""Scorers of models that take several steps to write the tokens of BrierLM, or know their probabilities.

Shapes: P targets, N draws, S steps of a window, K tokens of a step.
"""

import torch
from torch import Tensor

from calm.core.brier import share_of_equal_pairs, share_of_hits, window_of, windows_of_steps
from calm.core.chunks import is_behind_eos
from calm.evaluation.brier import Targets
from calm.evaluation.processes import Block
from calm.evaluation.readers import LikelihoodModel, StepModel


class StepScorer:
    """Scores a `StepModel` from draws: accuracy under teacher forcing, collisions along the first draw.

    Args:
        model: The model.
    """

    def __init__(self, model: StepModel) -> None:
        self.model = model
        self.chunk_size = window_of(model.unit_size)

    def estimate(
        self, block: Block, targets: Targets, num_draws: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """See `calm.evaluation.brier.ChunkScorer`."""
        text = self.model.read(block, targets, self.chunk_size)
        truth_SPK = targets.chunks_PK.unflatten(1, (text.num_steps, -1)).transpose(0, 1)
        has_ended_P = path_ended_P = torch.zeros(len(targets.chunks_PK), dtype=torch.bool).to(
            truth_SPK.device
        )
        hits, equal, follows = [], [], []
        outputs_PX = text.outputs_on_text(0)
        for step, truth_PK in enumerate(truth_SPK):
            draws_NPK = self._draw(text.outputs_on_text(step), has_ended_P, targets, num_draws, generator)
            hits.append(share_of_hits(draws_NPK, truth_PK))
            has_ended_P = has_ended_P | targets.end(truth_PK)[1]
            if step > 0:
                draws_NPK = self._draw(outputs_PX, path_ended_P, targets, num_draws, generator)
            equal.append(share_of_equal_pairs(draws_NPK))
            path_PK = draws_NPK[0]
            follows.append((draws_NPK[1:] == path_PK).all(-1).float().mean(0))
            path_ended_P = path_ended_P | targets.end(path_PK)[1]
            if step < text.num_steps - 1:
                outputs_PX = text.follow(path_PK)
        return windows_of_steps(torch.stack(hits), torch.stack(equal), torch.stack(follows))

    def _draw(
        self,
        outputs_PX: Tensor,
        has_ended_P: Tensor,
        targets: Targets,
        num_draws: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Draws of a step; nothing but padding where the text has ended."""
        draws_NPK, _ = targets.end(self.model.draw(outputs_PX, num_draws, generator))
        return torch.where(has_ended_P.unsqueeze(-1), targets.pad_token_id, draws_NPK)


class ProbabilityScorer:
    """Scores a `LikelihoodModel` from its probabilities: the same mean, far less variance.

    Sums over tokens replace draws wherever they can (Rao and Blackwell): P(y) is the product of the
    true tokens' probabilities; sum_x P(x)^2 of order n is the mean, over paths x that the model writes,
    of P(x_1)...P(x_(n-1)) · sum_v P(v | x_1..x_(n-1))^2. One path is written for each target.

    Args:
        model: The model.
    """

    def __init__(self, model: LikelihoodModel) -> None:
        self.model = model
        self.chunk_size = window_of(model.unit_size)

    def estimate(
        self, block: Block, targets: Targets, num_draws: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """See `calm.evaluation.brier.ChunkScorer`; the number of draws is not used."""
        text = self.model.read(block, targets, self.chunk_size)
        truth_SPK = targets.chunks_PK.unflatten(1, (text.num_steps, -1)).transpose(0, 1)
        has_ended_P = path_ended_P = torch.zeros_like(targets.chunks_PK[:, 0], dtype=torch.bool)
        hits, equal, follows = [], [], []
        outputs_PX = text.outputs_on_text(0)
        for step, truth_PK in enumerate(truth_SPK):
            chance_PK, _ = self._chances(text.outputs_on_text(step), truth_PK, has_ended_P, targets)
            hits.append(chance_PK)
            has_ended_P = has_ended_P | targets.end(truth_PK)[1]
            path_PK = self.model.draw(outputs_PX, 1, generator)[0]
            chance_PK, equal_PK = self._chances(outputs_PX, path_PK, path_ended_P, targets)
            equal.append(equal_PK)
            follows.append(chance_PK[:, -1])
            path_ended_P = path_ended_P | targets.end(path_PK)[1]
            if step < text.num_steps - 1:
                outputs_PX = text.follow(targets.end(path_PK)[0])
        return windows_of_steps(torch.stack(hits), torch.stack(equal), torch.stack(follows))

    def _chances(
        self, outputs_PX: Tensor, units_PK: Tensor, has_ended_P: Tensor, targets: Targets
    ) -> tuple[Tensor, Tensor]:
        """P(first n tokens of the units), and that times the chance that two draws of token n agree, (P, K).

        Behind the end of a text there is nothing but padding, with certainty.
        """
        token_PK, equal_PK = self.model.probabilities(outputs_PX, units_PK)
        over_PK = has_ended_P.unsqueeze(-1) | is_behind_eos(units_PK, targets.eos_ids)
        token_PK, equal_PK = token_PK.masked_fill(over_PK, 1.0), equal_PK.masked_fill(over_PK, 1.0)
        chance_PK = token_PK.cumprod(-1)
        before_PK = torch.cat([torch.ones_like(chance_PK[:, :1]), chance_PK[:, :-1]], dim=-1)
        return chance_PK, before_PK * equal_PK
