"""Perplexity of models that have probabilities, on the tokens that BrierLM scores."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calm.errors import InputError
from calm.evaluation.brier import Targets, targets_of
from calm.evaluation.processes import Block, add_over_processes
from calm.evaluation.samplers import scorer_of
from calm.evaluation.steps import CalmDraws, ShortChunks, Tokens
from calm.models.calm import CalmForCausalLM


@dataclass(frozen=True)
class PerplexityResult:
    """Cross-entropy of held-out text.

    Args:
        cross_entropy: Nats per token.
        num_tokens: Tokens it is a mean of, ends of text included.
    """

    cross_entropy: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the cross-entropy."""
        return math.exp(self.cross_entropy)


def has_likelihood(model: PreTrainedModel) -> bool:
    """Whether a model knows the probability of a text: all but a CALM, and a CALM whose head does."""
    return not isinstance(model, CalmForCausalLM) or model.head.has_likelihood


@torch.no_grad()
def evaluate_perplexity(
    model: PreTrainedModel,
    blocks: Iterable[Block],
    *,
    eos_token_id: int | list[int] | None,
    pad_token_id: int,
) -> PerplexityResult:
    """Cross-entropy of a model that `has_likelihood`, on the text as its blocks lay it out.

    Args:
        model: The model.
        blocks: Held-out blocks in chunks of K tokens, or of four, as for BrierLM.
        eos_token_id: Ids that end a text.
        pad_token_id: Padding after the end.

    Raises:
        InputError: If the blocks hold no target.
    """
    size = scorer_of(model).chunk_size
    total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.long)
    for _, block, targets in targets_of(blocks, size, eos_token_id=eos_token_id, pad_token_id=pad_token_id):
        losses_PK = _losses(model, block, targets, size)
        has_ended_P = torch.zeros_like(targets.chunks_PK[:, 0], dtype=torch.bool)
        for step, truth_P in enumerate(targets.chunks_PK.T):
            loss_P = losses_PK[~has_ended_P, step]
            total, count = total + loss_P.double().sum().cpu(), count + len(loss_P)
            has_ended_P = has_ended_P | targets.end(truth_P.unsqueeze(-1))[1]
    total, count = add_over_processes([total, count])
    if count == 0:
        raise InputError("the held-out text has no token to score; give more text.")
    return PerplexityResult(float(total / count), int(count))


def _losses(model: PreTrainedModel, block: Block, targets: Targets, size: int) -> Tensor:
    """Of each token of the targets given the text before it, (P, `size`)."""
    if isinstance(model, CalmForCausalLM) and model.config.chunk_size == size:
        # One step: no branches, and so no mask that some implementations of attention do not take.
        states_BCD = model.hidden_states_of_chunks(block["input_ids"], position_ids=block["position_ids"])
        return model.head.token_losses(states_BCD[:, :-1][targets.is_target_BC], targets.chunks_PK)
    reader = ShortChunks(CalmDraws(model)) if isinstance(model, CalmForCausalLM) else Tokens(model)
    text = reader.read(block, targets, size)
    losses = []
    for step, unit_PK in enumerate(targets.chunks_PK.split(reader.unit_size, dim=-1)):
        outputs_PX = text.outputs_on_text(step)
        if isinstance(model, CalmForCausalLM):
            losses.append(model.head.token_losses(outputs_PX, unit_PK))
        else:
            losses.append(-outputs_PX.float().log_softmax(-1).gather(1, unit_PK))
    return torch.cat(losses, dim=-1)
