"""Scorers of models that take several steps to write the tokens of BrierLM.

Shapes: P targets, N draws, S steps of a window, K tokens of a step, V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from calm.core.brier import NUM_ORDERS, share_of_equal_pairs, share_of_hits, window_of, windows_of_steps
from calm.core.temperature import TemperatureSettings
from calm.evaluation.branches import BranchedText
from calm.evaluation.brier import Targets
from calm.evaluation.processes import Block
from calm.models.calm import CalmForCausalLM


class StepModel(Protocol):
    """A decoder that writes units of K tokens."""

    unit_size: int

    def read(self, block: Block, targets: Targets, chunk_size: int) -> BranchedText:
        """The text of some blocks, ready for branches."""

    def draw(self, outputs_PX: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
        """Independent draws of the unit behind each output, (N, P, K)."""


class CalmDraws:
    """Draws of a CALM's next chunks at any temperature, with a count of what they took.

    Args:
        model: The model.
        settings: Sampler and temperature; one draw at T = 1 when None.
    """

    def __init__(self, model: CalmForCausalLM, settings: TemperatureSettings | None = None) -> None:
        self.model = model
        self.settings = settings or TemperatureSettings()
        self._made = self._samples = 0

    def __call__(self, hidden_PD: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
        """Independent samples of the chunk behind each state, (N, P, K)."""
        if self.settings.temperature == 1 and not self.settings.truncates:
            self._made, self._samples = self._made + 1, self._samples + 1
            return self.model.draw_chunks(hidden_PD, num_draws, generator)
        samples = [self.model.sample_chunks(hidden_PD, self.settings, generator) for _ in range(num_draws)]
        self._made += sum(int(sample.num_draws_R.sum()) for sample in samples)
        self._samples += num_draws * len(hidden_PD)
        return torch.stack([sample.chunks_RK for sample in samples])

    @property
    def mean_draws(self) -> float:
        """Draws that one sample has taken in the mean."""
        return self._made / self._samples


class ShortChunks:
    """A CALM with fewer than four tokens per chunk, as a `StepModel`."""

    def __init__(self, draws: CalmDraws) -> None:
        self.draw = draws
        self.model = draws.model
        self.unit_size = self.model.config.chunk_size

    def read(self, block: Block, targets: Targets, chunk_size: int) -> BranchedText:
        """See `StepModel`."""

        def decoder(tokens: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
            return self.model._run_backbone(tokens, mask, position_ids, cache, True).last_hidden_state

        return BranchedText(
            decoder,
            block,
            targets.is_target_BC,
            chunk_size=chunk_size,
            unit_size=self.unit_size,
            cache=DynamicCache(config=self.model.config.backbone),
            dtype=self.model.dtype,
        )


class Tokens:
    """A causal language model of tokens, as a `StepModel`; outputs are its scores.

    Args:
        model: The model.
        temperature: Divides the scores; above 0.
    """

    unit_size = 1

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0) -> None:
        self.model, self.temperature = model, temperature

    def read(self, block: Block, targets: Targets, chunk_size: int) -> BranchedText:
        """See `StepModel`."""

        def decoder(tokens: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
            return self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            ).logits

        return BranchedText(
            decoder,
            block,
            targets.is_target_BC,
            chunk_size=chunk_size,
            unit_size=1,
            cache=DynamicCache(),  # Without layers of its own kind: all keys stay, for branches to see.
            dtype=self.model.dtype,
        )

    def draw(self, outputs_PX: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
        """See `StepModel`."""
        tokens_PN = torch.multinomial(self.law(outputs_PX), num_draws, replacement=True, generator=generator)
        return tokens_PN.T.unsqueeze(-1)

    def law(self, outputs_PX: Tensor) -> Tensor:
        """Probabilities of the next token, (P, V)."""
        return (outputs_PX.float() / self.temperature).softmax(-1)


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
    """Scores a causal language model of tokens from its probabilities: the same mean, far less variance.

    Sums over tokens replace draws wherever they can (Rao and Blackwell): P(y) is the product of the
    true tokens' probabilities; sum_x P(x)^2 of order n is the mean, over paths x that the model writes,
    of P(x_1)...P(x_(n-1)) · sum_v P(v | x_1..x_(n-1))^2. One path is written for each target.

    Args:
        tokens: The model.
    """

    chunk_size = NUM_ORDERS

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens

    def estimate(
        self, block: Block, targets: Targets, num_draws: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """See `calm.evaluation.brier.ChunkScorer`; the number of draws is not used."""
        text = self.tokens.read(block, targets, self.chunk_size)
        one_P = torch.ones(len(targets.chunks_PK), device=targets.chunks_PK.device)
        has_ended_P = path_ended_P = one_P == 0
        hits, equal, follows = [], [], []
        outputs_PV = text.outputs_on_text(0)
        for step, truth_P in enumerate(targets.chunks_PK.T):
            truth_P1 = truth_P.unsqueeze(-1)
            law_PV = self.tokens.law(text.outputs_on_text(step))
            hits.append(torch.where(has_ended_P, one_P, law_PV.gather(1, truth_P1).squeeze(1)))
            has_ended_P = has_ended_P | targets.end(truth_P1)[1]
            law_PV = self.tokens.law(outputs_PV)
            equal.append(torch.where(path_ended_P, one_P, law_PV.square().sum(-1)))
            path_P1 = torch.multinomial(law_PV, 1, generator=generator)
            follows.append(torch.where(path_ended_P, one_P, law_PV.gather(1, path_P1).squeeze(1)))
            path_ended_P = path_ended_P | targets.end(path_P1)[1]
            if step < text.num_steps - 1:
                outputs_PV = text.follow(path_P1)
        return windows_of_steps(
            torch.stack(hits).unsqueeze(-1), torch.stack(equal).unsqueeze(-1), torch.stack(follows)
        )
