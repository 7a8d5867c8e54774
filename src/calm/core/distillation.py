"""Knowledge distillation, without holding the logits of all rows in memory.

The loss of a row is (1 - w) times the cross-entropy of its token plus w·T² times KL(q || p), where q is the
softmax of the teacher's logits divided by a temperature T and p that of the student's (Hinton et al., arXiv
1503.02531: gradients of the second term shrink as 1/T², so it is multiplied by T²). As in
`calm.core.cross_entropy`, on a CPU the logits of both are computed for a few rows at a time, together with
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

from calm.core.fused_losses import are_equal, cast_for_autocast, register_gradients

_LOGITS_IN_PART = 2**23  # On a CPU: 32 MB each for student and teacher.
_FEWEST_ROWS = 64  # Per part: products of fewer rows are slow.
_LOGITS_AT_ONCE = 2**25  # On other devices, each for student and teacher.


class SoftTargets(NamedTuple):
    """A teacher's predictions for the tokens of M rows.

    Both vocabularies start with the same tokens. Tokens that the student lacks are left out, and tokens that
    the teacher lacks have probability 0 under it: embeddings may be padded on either side.

    Args:
        states_MY: The teacher's hidden states where the tokens are predicted.
        table_UY: Its output embeddings, whose products with a state are the logits.
        bias_U: Added to the logits.
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
        table_VX: A vector for each token; its product with a row's is the token's logit.
        targets_M: Target token of each row.
        soft_targets: The teacher's predictions, which get no gradient.
    """
    size = len(table_VX)
    is_trained = torch.is_grad_enabled() and (vectors_MX.requires_grad or table_VX.requires_grad)
    if not (is_trained and vectors_MX.is_cpu):
        return distillation_of_logits(
            lambda vectors_RX: F.linear(vectors_RX, table_VX), size, vectors_MX, targets_M, soft_targets
        )
    soft_targets = soft_targets.of_first(size)
    vectors_MX, table_VX = cast_for_autocast(vectors_MX, table_VX)
    losses: Tensor = _losses_and_gradients(vectors_MX, table_VX, targets_M, *soft_targets)[0]
    return losses


def distillation_of_logits(
    logits_of: Callable[[Tensor], Tensor],
    size: int,
    vectors_MX: Tensor,
    targets_M: Tensor,
    soft_targets: SoftTargets,
) -> Tensor:
    """`distillation` for a student whose logits are not just products with a table.

    Args:
        logits_of: Computes the logits of some rows, (R, V), from their vectors.
        size: V; the teacher's further tokens are left out.
        vectors_MX: See `distillation`.
        targets_M: See `distillation`.
        soft_targets: See `distillation`.
    """
    soft_targets = soft_targets.of_first(size)

    def losses(vectors_RX: Tensor, targets_R: Tensor, states_RY: Tensor, weights_R: Tensor) -> Tensor:
        logits_RV = _at_least_float32(logits_of(vectors_RX))
        teacher_RU = _teacher_logits(states_RY, soft_targets.table_UY, soft_targets.bias_U)
        log_p_RV, log_q_RU = (
            (logits / soft_targets.temperature).log_softmax(-1) for logits in (logits_RV, teacher_RU)
        )
        divergence_R = (log_q_RU.exp() * (log_q_RU - log_p_RV[:, : log_q_RU.shape[1]])).sum(-1)
        cross_entropy_R = F.cross_entropy(logits_RV, targets_R, reduction="none")
        return (1 - weights_R) * cross_entropy_R + weights_R * soft_targets.temperature**2 * divergence_R

    num_rows = max(1, _LOGITS_AT_ONCE // size)
    inputs = (vectors_MX, targets_M, soft_targets.states_MY, soft_targets.weights_M)
    if len(vectors_MX) <= num_rows:
        return losses(*inputs)
    parts = zip(*(tensor.split(num_rows) for tensor in inputs), strict=True)
    return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])


def _teacher_logits(states_RY: Tensor, table_UY: Tensor, bias_U: Tensor | None) -> Tensor:
    """The teacher's logits, in its own precision whatever the student's."""
    with torch.autocast(states_RY.device.type, enabled=False):
        return _at_least_float32(F.linear(states_RY, table_UY, bias_U))


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.library.custom_op("calm::distillation", mutates_args=())
def _losses_and_gradients(
    vectors: Tensor,
    table: Tensor,
    targets: Tensor,
    states: Tensor,
    teacher_table: Tensor,
    teacher_bias: Tensor | None,
    teacher_weights: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, (M,), and the gradients of their sum w.r.t. the vectors and the table."""
    soft_targets = SoftTargets(states, teacher_table, teacher_bias, teacher_weights, temperature)
    return _in_parts(vectors, table, targets, soft_targets)


@torch.library.custom_op("calm::distillation_backward", mutates_args=())
def _weighted_gradients(
    weights: Tensor,
    vectors: Tensor,
    table: Tensor,
    targets: Tensor,
    states: Tensor,
    teacher_table: Tensor,
    teacher_bias: Tensor | None,
    teacher_weights: Tensor,
    temperature: float,
    grad_vectors: Tensor,
    grad_table: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of a weighted sum of the losses, given those of the unweighted sum."""
    if are_equal(weights):
        return grad_vectors * weights[0].to(grad_vectors.dtype), grad_table * weights[0]
    soft_targets = SoftTargets(states, teacher_table, teacher_bias, teacher_weights, temperature)
    return _in_parts(vectors, table, targets, soft_targets, weights)[1:]


def _in_parts(
    vectors_MX: Tensor,
    table_VX: Tensor,
    targets_M: Tensor,
    soft_targets: SoftTargets,
    weights_M: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradients of their sum, weighted by `weights_M`, a few rows at a time.

    Besides its outputs, memory holds some rows' logits of both models, log-probabilities and gradients.
    """
    states_MY, table_UY, bias_U, teacher_weights_M, temperature = soft_targets
    losses_M, grad_vectors_MX, grad_table_VX = _allocate_outputs(vectors_MX, table_VX)
    grad_table_VX.zero_()
    num_rows = max(_FEWEST_ROWS, _LOGITS_IN_PART // len(table_VX))
    for first in range(0, len(vectors_MX), num_rows):
        part = slice(first, first + num_rows)
        targets_R1, weight_R1 = targets_M[part].unsqueeze(-1), teacher_weights_M[part].unsqueeze(-1)
        logits_RV = _at_least_float32(F.linear(vectors_MX[part], table_VX))
        teacher_RU = _teacher_logits(states_MY[part], table_UY, bias_U)
        log_p_RV = logits_RV.log_softmax(-1)
        cross_entropy_R1 = -log_p_RV.gather(1, targets_R1)
        # The gradient of the cross-entropy w.r.t. the logits is p, minus 1 at the target.
        grad_logits_RV = log_p_RV.exp()
        grad_logits_RV.scatter_add_(1, targets_R1, torch.full_like(cross_entropy_R1, -1))
        grad_logits_RV *= 1 - weight_R1
        if temperature != 1:
            log_p_RV = logits_RV.div_(temperature).log_softmax(-1)
        log_q_RU = teacher_RU.div_(temperature).log_softmax(-1)
        q_RU, shared = log_q_RU.exp(), slice(0, teacher_RU.shape[1])
        divergence_R1 = log_q_RU.sub_(log_p_RV[:, shared]).mul_(q_RU).sum(-1, keepdim=True)
        losses_M[part] = (
            (1 - weight_R1) * cross_entropy_R1 + weight_R1 * temperature**2 * divergence_R1
        ).squeeze(-1)
        # That of T² times the divergence is T (p - q).
        p_RV = log_p_RV.exp_()
        p_RV[:, shared] -= q_RU
        grad_logits_RV += p_RV.mul_(weight_R1 * temperature)
        if weights_M is not None:
            grad_logits_RV *= weights_M[part].unsqueeze(-1)
        grad_logits_RV = grad_logits_RV.to(vectors_MX.dtype)
        torch.mm(grad_logits_RV, table_VX, out=grad_vectors_MX[part])
        grad_table_VX += grad_logits_RV.t() @ vectors_MX[part]
    return losses_M, grad_vectors_MX, grad_table_VX


def _allocate_outputs(vectors: Tensor, table: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return (
        vectors.new_empty(len(vectors), dtype=dtype),
        torch.empty_like(vectors, memory_format=torch.contiguous_format),
        torch.empty_like(table, dtype=dtype, memory_format=torch.contiguous_format),
    )


register_gradients(_losses_and_gradients, _weighted_gradients, _allocate_outputs)


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
    """FLOPs of the student's logits and both gradients, and of the teacher's logits."""
    return vectors[0] * (6 * table[0] * table[1] + 2 * teacher[0] * teacher[1])
