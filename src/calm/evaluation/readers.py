"""How models of several kinds are read where text is scored: step by step, with probabilities or without.

Shapes: P targets, N draws, K tokens of a step, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from calm.core.temperature import TemperatureSettings
from calm.evaluation.branches import BranchedText
from calm.evaluation.brier import Targets
from calm.evaluation.processes import Block
from calm.models.calm import CalmForCausalLM
from calm.models.heads.base import LOWEST_OF_LAWS


class Text(Protocol):
    """Some blocks that were read; see `calm.evaluation.branches.BranchedText`."""

    num_steps: int

    def outputs_on_text(self, step: int) -> Tensor:
        """Output behind the unit before a target's unit number `step` in the true text, (P, X)."""

    def follow(self, units_PK: Tensor) -> Tensor:
        """Let every branch take one more step; output behind it, (P, X)."""


class StepModel(Protocol):
    """A decoder that writes units of K tokens."""

    unit_size: int

    def read(self, block: Block, targets: Targets, chunk_size: int) -> Text:
        """The text of some blocks, ready for branches."""

    def draw(self, outputs_PX: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
        """Independent draws of the unit behind each output, (N, P, K)."""


class LikelihoodModel(StepModel, Protocol):
    """A `StepModel` that knows the probabilities of what it draws."""

    def losses(self, outputs_PX: Tensor, units_PK: Tensor) -> Tensor:
        """Cross-entropy of each token of a unit given all before it, at T = 1, in nats, (P, K)."""

    def probabilities(self, outputs_PX: Tensor, units_PK: Tensor) -> tuple[Tensor, Tensor]:
        """Chance to draw each token of a unit given all before it, and that two draws of it agree, (P, K)."""


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
        if self.is_untempered:
            self._made, self._samples = self._made + 1, self._samples + 1
            return self.model.draw_chunks(hidden_PD, num_draws, generator)
        samples = [self.model.sample_chunks(hidden_PD, self.settings, generator) for _ in range(num_draws)]
        self._made += sum(int(sample.num_draws_R.sum()) for sample in samples)
        self._samples += num_draws * len(hidden_PD)
        return torch.stack([sample.chunks_RK for sample in samples])

    @property
    def is_untempered(self) -> bool:
        """Whether samples are plain draws of the head."""
        return self.settings.temperature == 1 and not self.settings.truncates

    @property
    def have_probabilities(self) -> bool:
        """Whether the law of the samples is known: that of the head, at T = 1 or its own below."""
        is_law = self.settings.sampler == "head" and self.settings.temperature >= LOWEST_OF_LAWS
        return self.model.head.has_likelihood and (self.is_untempered or is_law)

    @property
    def mean_draws(self) -> float:
        """Draws that one sample has taken in the mean."""
        return self._made / self._samples


@dataclass
class _OneStep:
    """A text whose targets are single units: no branches, and so no mask that some attentions do not take."""

    outputs_PX: Tensor
    num_steps: int = 1

    def outputs_on_text(self, step: int) -> Tensor:
        """See `Text`."""
        return self.outputs_PX

    def follow(self, units_PK: Tensor) -> Tensor:
        """There is no step to take."""
        raise IndexError("targets of one unit have no second step.")


class Chunks:
    """A CALM as a `StepModel` of chunks, and as a `LikelihoodModel` where `draws.have_probabilities`.

    Args:
        draws: The model and how it is sampled.
    """

    def __init__(self, draws: CalmDraws) -> None:
        self.draw = draws
        self.model = draws.model
        self.unit_size = self.model.config.chunk_size

    def read(self, block: Block, targets: Targets, chunk_size: int) -> Text:
        """See `StepModel`."""
        if chunk_size == self.unit_size:
            states_BCD = self.model.hidden_states_of_chunks(
                block["input_ids"], position_ids=block["position_ids"]
            )
            return _OneStep(states_BCD[:, :-1][targets.is_target_BC])

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

    def losses(self, outputs_PX: Tensor, units_PK: Tensor) -> Tensor:
        """See `LikelihoodModel`."""
        return self.model.head.token_losses(outputs_PX, units_PK)

    def probabilities(self, outputs_PX: Tensor, units_PK: Tensor) -> tuple[Tensor, Tensor]:
        """See `LikelihoodModel`."""
        temperature = self.draw.settings.temperature
        chances = self.model.head.token_probabilities(outputs_PX, units_PK, temperature)
        return chances.of_token_PK, chances.of_pair_PK


class Tokens:
    """A causal language model of tokens, as a `LikelihoodModel`; outputs are its scores.

    Args:
        model: The model.
        temperature: Divides the scores; above 0.
    """

    unit_size = 1

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0) -> None:
        self.model, self.temperature = model, temperature

    def read(self, block: Block, targets: Targets, chunk_size: int) -> Text:
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

    def losses(self, outputs_PX: Tensor, units_PK: Tensor) -> Tensor:
        """See `LikelihoodModel`."""
        return -outputs_PX.float().log_softmax(-1).gather(1, units_PK)

    def probabilities(self, outputs_PX: Tensor, units_PK: Tensor) -> tuple[Tensor, Tensor]:
        """See `LikelihoodModel`."""
        law_PV = self.law(outputs_PX)
        return law_PV.gather(1, units_PK), law_PV.square().sum(-1, keepdim=True)
