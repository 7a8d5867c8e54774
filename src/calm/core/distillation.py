"""Knowledge distillation, without holding the logits (scores) of all rows in memory.

The loss of a row is (1 - w) times the cross-entropy of its token plus w·T² times KL(q || p), where q is the
softmax of the teacher's scores divided by a temperature T and p that of the student's (Hinton et al., arXiv
1503.02531: gradients of the second term shrink as 1/T², so it is multiplied by T²). As in
`calm.core.cross_entropy`, on a CPU the scores of both are computed for a few rows at a time, together with
the gradients.

Shapes: M rows, X size of their vectors, V vocabulary, Y size of the teacher's states, U its vocabulary; R
rows of a part.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

_SCORES_IN_PART = 2**23  # On a CPU: 32 MB each for student and teacher.
_FEWEST_ROWS = 64  # Per part: products of fewer rows are slow.
_SCORES_AT_ONCE = 2**25  # On other devices, each for student and teacher.


class SoftTargets(NamedTuple):
    """A teacher's predictions for the tokens of M rows.

    Both vocabularies start with the same tokens. Tokens that the student lacks are left out, and tokens that
    the teacher lacks have probability 0 under it: embeddings may be padded on either side.

    Args:
        states_MY: The teacher's hidden states where the tokens are predicted.
        table_UY: Its output embeddings, whose products with a state are the scores.
        bias_U: Added to the scores.
        weights_M: The teacher's share w of each row's loss, from 0 to 1.
        temperature: T, above 0.
    """

    states_MY: Tensor
    table_UY: Tensor
    bias_U: Tensor | None
    weights_M: Tensor
    temperature: float = 1.0

    def of_first(self, size: int) -> "SoftTargets":
        """The predictions restricted to the first `size` tokens."""
        bias_U = None if self.bias_U is None else self.bias_U[:size]
        return self._replace(table_UY=self.table_UY[:size], bias_U=bias_U)


def distillation(
    vectors_MX: Tensor, table_VX: Tensor, targets_M: Tensor, soft_targets: SoftTargets
) -> Tensor:
    """Distillation loss of each row, (M,), in nats.

    Args:
        vectors_MX: A vector for each row.
        table_VX: A vector for each token; its product with a row's is the token's score.
        targets_M: Target token of each row.
        soft_targets: The teacher's predictions, which get no gradient.
    """
    size = len(table_VX)
    is_trained = torch.is_grad_enabled() and (vectors_MX.requires_grad or table_VX.requires_grad)
    if not (is_trained and vectors_MX.is_cpu):
        return distillation_of_scores(
            lambda rows_RX: F.linear(rows_RX, table_VX), size, vectors_MX, targets_M, soft_targets
        )
    soft_targets = soft_targets.of_first(size)
    if torch.is_autocast_enabled("cpu"):  # It does not apply to custom operators.
        dtype = torch.get_autocast_dtype("cpu")
        vectors_MX, table_VX = vectors_MX.to(dtype), table_VX.to(dtype)
    losses: Tensor = _losses_and_gradients(vectors_MX, table_VX, targets_M, *soft_targets)[0]
    return losses


def distillation_of_scores(
    scores_of: Callable[[Tensor], Tensor],
    size: int,
    vectors_MX: Tensor,
    targets_M: Tensor,
    soft_targets: SoftTargets,
) -> Tensor:
    """`distillation` for a student whose scores are not just products with a table.

    Args:
        scores_of: Computes the scores of some rows, (R, V), from their vectors.
        size: V; the teacher's further tokens are left out.
        vectors_MX: See `distillation`.
        targets_M: See `distillation`.
        soft_targets: See `distillation`.
    """
    soft_targets = soft_targets.of_first(size)

    def of_part(vectors_RX: Tensor, target_R: Tensor, states_RY: Tensor, weights_R: Tensor) -> Tensor:
        scores_RV = _wide(scores_of(vectors_RX))
        teacher_RU = _teacher_logits(states_RY, soft_targets.table_UY, soft_targets.bias_U)
        log_p_RV, log_q_RU = (
            (scores / soft_targets.temperature).log_softmax(-1) for scores in (scores_RV, teacher_RU)
        )
        divergence_R = (log_q_RU.exp() * (log_q_RU - log_p_RV[:, : log_q_RU.shape[1]])).sum(-1)
        cross_entropy_R = F.cross_entropy(scores_RV, target_R, reduction="none")
        return (1 - weights_R) * cross_entropy_R + weights_R * soft_targets.temperature**2 * divergence_R

    rows = max(1, _SCORES_AT_ONCE // size)
    of_rows = (vectors_MX, targets_M, soft_targets.states_MY, soft_targets.weights_M)
    if len(vectors_MX) <= rows:
        return of_part(*of_rows)
    parts = zip(*(one.split(rows) for one in of_rows), strict=True)
    return torch.cat([checkpoint(of_part, *part, use_reentrant=False) for part in parts])


def _teacher_logits(states_RY: Tensor, table_UY: Tensor, bias_U: Tensor | None) -> Tensor:
    """The teacher's scores, in its own precision whatever the student's."""
    with torch.autocast(states_RY.device.type, enabled=False):
        return _wide(F.linear(states_RY, table_UY, bias_U))


def _wide(scores: Tensor) -> Tensor:
    """Scores in at least float32."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


# Operators rather than an autograd.Function, so that compilers and fake tensors need not trace into them.


@torch.library.custom_op("calm::distillation", mutates_args=())
def _losses_and_gradients(
    vectors: Tensor,
    table: Tensor,
    targets: Tensor,
    states: Tensor,
    teacher_table: Tensor,
    teacher_bias: Tensor | None,
    weights: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, (M,), and the gradients of their sum w.r.t. the vectors and the table."""
    return _in_parts(
        vectors, table, targets, SoftTargets(states, teacher_table, teacher_bias, weights, temperature)
    )


@torch.library.custom_op("calm::distillation_backward", mutates_args=())
def _gradients(
    of_losses: Tensor,
    vectors: Tensor,
    table: Tensor,
    targets: Tensor,
    states: Tensor,
    teacher_table: Tensor,
    teacher_bias: Tensor | None,
    weights: Tensor,
    temperature: float,
    by_vectors: Tensor,
    by_table: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of a weighted sum of the losses, given those of the unweighted sum."""
    if len(of_losses) and bool((of_losses == of_losses[0]).all()):  # As for a mean.
        return by_vectors * of_losses[0].to(by_vectors.dtype), by_table * of_losses[0]
    soft_targets = SoftTargets(states, teacher_table, teacher_bias, weights, temperature)
    return _in_parts(vectors, table, targets, soft_targets, of_losses)[1:]


def _in_parts(
    vectors_MX: Tensor,
    table_VX: Tensor,
    targets_M: Tensor,
    soft_targets: SoftTargets,
    of_losses_M: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradients of their sum, weighted by `of_losses_M`.

    Besides its outputs, memory holds some rows' scores of both models, log-probabilities and gradients.
    """
    states_MY, table_UY, bias_U, weights_M, temperature = soft_targets
    losses_M, by_vectors_MX, by_table_VX = _outputs(vectors_MX, table_VX)
    by_table_VX.zero_()
    rows = max(_FEWEST_ROWS, _SCORES_IN_PART // len(table_VX))
    for first in range(0, len(vectors_MX), rows):
        part = slice(first, first + rows)
        target_R1, weight_R1 = targets_M[part].unsqueeze(-1), weights_M[part].unsqueeze(-1)
        scores_RV = _wide(F.linear(vectors_MX[part], table_VX))
        teacher_RU = _teacher_logits(states_MY[part], table_UY, bias_U)
        log_p_RV = scores_RV.log_softmax(-1)
        cross_entropy_R1 = -log_p_RV.gather(1, target_R1)
        by_scores_RV = log_p_RV.exp()
        by_scores_RV.scatter_add_(1, target_R1, torch.full_like(cross_entropy_R1, -1))
        by_scores_RV *= 1 - weight_R1
        if temperature != 1:
            log_p_RV = scores_RV.div_(temperature).log_softmax(-1)
        log_q_RU = teacher_RU.div_(temperature).log_softmax(-1)
        q_RU, shared = log_q_RU.exp(), slice(0, teacher_RU.shape[1])
        divergence_R1 = log_q_RU.sub_(log_p_RV[:, shared]).mul_(q_RU).sum(-1, keepdim=True)
        losses_M[part] = (
            (1 - weight_R1) * cross_entropy_R1 + weight_R1 * temperature**2 * divergence_R1
        ).squeeze(-1)
        p_RV = log_p_RV.exp_()
        p_RV[:, shared] -= q_RU
        by_scores_RV += p_RV.mul_(weight_R1 * temperature)
        if of_losses_M is not None:
            by_scores_RV *= of_losses_M[part].unsqueeze(-1)
        by_scores_RV = by_scores_RV.to(vectors_MX.dtype)
        torch.mm(by_scores_RV, table_VX, out=by_vectors_MX[part])
        by_table_VX += by_scores_RV.t() @ vectors_MX[part]
    return losses_M, by_vectors_MX, by_table_VX


def _outputs(vectors: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    by_vectors = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    by_table = torch.empty_like(table, dtype=dtype, memory_format=torch.contiguous_format)
    return vectors.new_empty(len(vectors), dtype=dtype), by_vectors, by_table


@_losses_and_gradients.register_fake
def _(vectors: Tensor, table: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _outputs(vectors, table)


@_gradients.register_fake
def _(of_losses: Tensor, vectors: Tensor, table: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _outputs(vectors, table)[1:]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature = inputs
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *gradients)


def _backward(ctx: Any, of_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, by_vectors, by_table = ctx.saved_tensors
    by_vectors, by_table = _gradients(of_losses, *tensors, ctx.temperature, by_vectors, by_table)
    return by_vectors, by_table.to(tensors[1].dtype), *[None] * 6


_losses_and_gradients.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.calm.distillation)
def _flops(
    vectors: torch.Size,
    table: torch.Size,
    targets: Any,
    states: torch.Size,
    teacher: torch.Size,
    *_: Any,
    **__: Any,
) -> int:
    """FLOPs of the student's scores and both gradients, and of the teacher's scores."""
    return vectors[0] * (6 * table[0] * table[1] + 2 * teacher[0] * teacher[1])
