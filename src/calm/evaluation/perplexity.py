"""Perplexity of models that have probabilities, on the tokens that BrierLM scores."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from calm.core.brier import NUM_ORDERS
from calm.errors import InputError
from calm.evaluation.brier import targets_of
from calm.evaluation.processes import Block, add_over_processes
from calm.evaluation.steps import Tokens


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


@torch.no_grad()
def evaluate_perplexity(
    model: PreTrainedModel,
    blocks: Iterable[Block],
    *,
    eos_token_id: int | list[int] | None,
    pad_token_id: int,
) -> PerplexityResult:
    """Cross-entropy of a causal language model of tokens, on the text as its blocks lay it out.

    Args:
        model: The model.
        blocks: Held-out blocks in chunks of four tokens, as for BrierLM.
        eos_token_id: Ids that end a text.
        pad_token_id: Padding after the end.

    Raises:
        InputError: If the blocks hold no target.
    """
    reader = Tokens(model)
    total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.long)
    for _, block, targets in targets_of(
        blocks, NUM_ORDERS, eos_token_id=eos_token_id, pad_token_id=pad_token_id
    ):
        text = reader.read(block, targets, NUM_ORDERS)
        has_ended_P = torch.zeros_like(targets.chunks_PK[:, 0], dtype=torch.bool)
        for step, truth_P in enumerate(targets.chunks_PK.T):
            truth_P1 = truth_P.unsqueeze(-1)
            log_law_PV = text.outputs_on_text(step).float().log_softmax(-1)
            loss_P = -log_law_PV.gather(1, truth_P1).squeeze(1)[~has_ended_P]
            total, count = total + loss_P.double().sum().cpu(), count + len(loss_P)
            has_ended_P = has_ended_P | targets.end(truth_P1)[1]
    total, count = add_over_processes([total, count])
    if count == 0:
        raise InputError("the held-out text has no token to score; give more text.")
    return PerplexityResult(float(total / count), int(count))
