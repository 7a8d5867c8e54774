"""Cross-entropy of a linear layer's logits, without holding the logits (scores) of all rows in memory.

With few features and many tokens, the scores are the largest tensor of a training step, and each pass over
them costs more than the matrix product that made them. On a CPU they are computed for as many rows as fit in
the cache, together with the gradients, so the backward pass only has to scale them. (Known for sums and
means on GPUs as fused linear cross-entropy, Hsu et al., arXiv 2410.10989. Here each row has its own loss.)

Shapes: M rows, X size of their vectors, V vocabulary; S shares of R rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

SCORES_AT_ONCE = 2**26
"""More than this are computed in parts, and those of a loss recomputed in the backward pass."""

_SCORES_IN_CACHE = 2**18  # Per core; but at least 64 rows, since products of fewer are slow.
_ROWS_OF_WIDE_VECTORS = 256  # Each part passes over the table's gradient, which grows with the features.
_ROWS_IN_HALF_PRECISION = 1024  # The same passes, in float32, then take longer than the products.

_ROUNDED = 1e-30  # Probabilities below this are close to underflow.


def cross_entropy(
    vectors_MX: Tensor, table_VX: Tensor, targets_M: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each row, (M,), in nats, under the softmax of its products with the table.

    Args:
        vectors_MX: A vector for each row.
        table_VX: A vector for each token.
        targets_M: Target token of each row.
        bias_V: Added to the products.
    """
    weights = [part for part in (vectors_MX, table_VX, bias_V) if part is not None]
    is_trained = torch.is_grad_enabled() and any(part.requires_grad for part in weights)
    # With fewer rows than features, the scores are smaller than the table, and fusing is no faster.
    is_small = len(vectors_MX) < vectors_MX.shape[1]
    if not (is_trained and vectors_MX.is_cpu) or is_small:
        return _of_scores(vectors_MX, table_VX, targets_M, bias_V)
    if torch.is_autocast_enabled("cpu"):  # It does not apply to custom operators.
        dtype = torch.get_autocast_dtype("cpu")
        vectors_MX, table_VX = vectors_MX.to(dtype), table_VX.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    losses: Tensor = _losses_and_gradients(vectors_MX, table_VX, targets_M, bias_V)[0]
    return losses


def rows_at_once(num_scores: int) -> int:
    """Number of rows, with `num_scores` scores each, whose scores may be in memory together."""
    return max(1, SCORES_AT_ONCE // num_scores)


def _of_scores(vectors_MX: Tensor, table_VX: Tensor, targets_M: Tensor, bias_V: Tensor | None) -> Tensor:
    def of_part(part_MX: Tensor, target_M: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(part_MX, table_VX, bias_V).float(), target_M, reduction="none")

    rows = rows_at_once(len(table_VX))
    if len(vectors_MX) <= rows:
        return of_part(vectors_MX, targets_M)
    parts = zip(vectors_MX.split(rows), targets_M.split(rows), strict=True)
    return torch.cat([checkpoint(of_part, part, target, use_reentrant=False) for part, target in parts])


# Operators rather than an autograd.Function, so that compilers and fake tensors need not trace into them.


@torch.library.custom_op("calm::cross_entropy", mutates_args=())
def _losses_and_gradients(
    vectors: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, (M,), and the gradients of their sum w.r.t. the vectors, the table and the bias."""
    return _in_parts(vectors, table, targets, bias)


@torch.library.custom_op("calm::cross_entropy_backward", mutates_args=())
def _gradients(
    weights: Tensor,
    vectors: Tensor,
    table: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    by_vectors: Tensor,
    by_table: Tensor,
    by_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a weighted sum of the losses, given those of the unweighted sum.

    If the weights differ, those of the table and the bias are recomputed, for two thirds of the FLOPs.
    """
    if len(weights) and bool((weights == weights[0]).all()):  # As for a mean.
        weight = weights[0]
        return by_vectors * weight, by_table * weight, by_bias * weight
    _, _, by_table, by_bias = _in_parts(vectors, table, targets, bias, weights)
    return by_vectors * weights.unsqueeze(-1).to(by_vectors.dtype), by_table, by_bias


def _in_parts(
    vectors_MX: Tensor,
    table_VX: Tensor,
    targets_M: Tensor,
    bias_V: Tensor | None,
    weights_M: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and gradients; with weights, only the gradients w.r.t. the table and the bias.

    Besides its outputs, memory holds the scores and probabilities of some rows, at most `SCORES_AT_ONCE`
    each; with a bias, a second table and its gradient; in half precision, another table and a partial
    gradient. The table is not copied per core.
    """
    losses_M, by_vectors_MX, by_table_VX, by_bias_V = _outputs(vectors_MX, table_VX)
    left_MY, right_VY, by_right_VY = vectors_MX, table_VX, by_table_VX
    if bias_V is not None:  # The bias is the weight of one more feature that is always 1.
        left_MY = F.pad(vectors_MX, (0, 1), value=1)
        right_VY = torch.cat([table_VX, bias_V.unsqueeze(-1)], dim=-1)
        by_right_VY = torch.empty_like(right_VY, dtype=torch.float32)
    by_right_VY.zero_()
    cores, size, width = torch.get_num_threads(), len(table_VX), vectors_MX.shape[1]
    right_YV, wide = right_VY.t(), min(width, _ROWS_OF_WIDE_VECTORS)
    if right_YV.dtype != by_right_VY.dtype:  # In half precision, products would copy it once per core.
        right_YV, wide = right_YV.contiguous(), min(4 * width, _ROWS_IN_HALF_PRECISION)
    rows = max(max(64, _SCORES_IN_CACHE // size) * cores, wide)
    rows = min(rows, SCORES_AT_ONCE // size, len(vectors_MX))
    rows = max(rows // cores, 1) * cores
    # All parts reuse these buffers: writing to fresh memory is slower than everything else done with it.
    scores_RV = vectors_MX.new_empty(rows, size)
    p_RV = torch.empty_like(scores_RV, dtype=torch.float32)
    for first in range(0, len(vectors_MX), rows):
        part = slice(first, first + rows)
        target_M1 = targets_M[part].unsqueeze(-1)
        scores_MV, p_MV = scores_RV[: len(target_M1)], p_RV[: len(target_M1)]
        left_SRY = _shared(left_MY[part], cores)
        shares = len(left_SRY)
        torch.bmm(left_SRY, right_YV.expand(shares, -1, -1), out=_shared(scores_MV, cores))
        torch.softmax(scores_MV, -1, dtype=torch.float32, out=p_MV)
        losses_M[part] = _losses(scores_MV, p_MV, target_M1)
        p_MV.scatter_add_(1, target_M1, p_MV.new_full((), -1).expand_as(target_M1))
        if weights_M is not None:
            p_MV *= weights_M[part].unsqueeze(-1)
        if p_MV.dtype != scores_MV.dtype:
            p_MV = scores_MV.copy_(p_MV)
        if weights_M is None:
            p_SRV = _shared(p_MV, cores)
            torch.bmm(p_SRV, table_VX.expand(shares, -1, -1), out=_shared(by_vectors_MX[part], cores))
        if p_MV.dtype == by_right_VY.dtype:
            by_right_VY.addmm_(p_MV.t(), left_MY[part])
        else:
            by_right_VY += p_MV.t() @ left_MY[part]
    if bias_V is None:
        by_bias_V.zero_()
    else:
        by_table_VX.copy_(by_right_VY[:, :-1])
        by_bias_V.copy_(by_right_VY[:, -1])
    return losses_M, by_vectors_MX, by_table_VX, by_bias_V


def _losses(scores_MV: Tensor, p_MV: Tensor, targets_M1: Tensor) -> Tensor:
    """Cross-entropy of each row, (M,), from scores and their softmax."""
    p_M1 = p_MV.gather(1, targets_M1)
    losses_M1 = -p_M1.log()
    if bool((p_M1 < _ROUNDED).any()):  # The likeliest token, whose p is never 0, gives the log-sum-exp.
        sums_M1 = scores_MV.amax(-1, keepdim=True).float() - p_MV.amax(-1, keepdim=True).log()
        losses_M1 = torch.where(p_M1 < _ROUNDED, sums_M1 - scores_MV.gather(1, targets_M1), losses_M1)
    return losses_M1.squeeze(-1)


def _shared(rows_MX: Tensor, cores: int) -> Tensor:
    """Rows split into equal shares, one per core, (S, R, X); a single share if they do not divide evenly.

    Batched products and softmax then process the same rows on the same core, so scores stay in its cache.
    """
    return rows_MX.unflatten(0, (1 if len(rows_MX) % cores else cores, -1))


def _outputs(vectors: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    by_table = torch.empty_like(table, dtype=torch.float32, memory_format=torch.contiguous_format)
    losses, by_bias = (one.new_empty(len(one), dtype=torch.float32) for one in (vectors, table))
    by_vectors = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    return losses, by_vectors, by_table, by_bias


@_losses_and_gradients.register_fake
def _(vectors: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    return _outputs(vectors, table)


@_gradients.register_fake
def _(weights: Tensor, vectors: Tensor, table: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _outputs(vectors, table)[1:]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *gradients)


def _backward(ctx: Any, weights: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    vectors, table, targets, bias, *gradients = ctx.saved_tensors
    by_vectors, by_table, by_bias = _gradients(weights, vectors, table, targets, bias, *gradients)
    return by_vectors, by_table.to(table.dtype), None, None if bias is None else by_bias.to(bias.dtype)


_losses_and_gradients.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.calm.cross_entropy)
def _flops(vectors: torch.Size, table: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of the scores and both gradients."""
    return 6 * vectors[0] * table[0] * table[1]
