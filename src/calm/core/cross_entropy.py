"""Cross-entropy of a linear layer's logits, without holding the logits of all rows in memory.

With few features and many tokens, the logits are the largest tensor of a training step, and each pass over
them costs more than the matrix product that made them. On a CPU they are computed for as many rows as fit in
the cache, together with the gradients, so the backward pass only has to scale them. (Known for sums and
means on GPUs as fused linear cross-entropy, Hsu et al., arXiv 2410.10989. Here each row has its own loss.)

Shapes: M rows, X size of their vectors, V vocabulary, R rows of a part; Y features, X or, with a bias, X + 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from calm.core.fused_losses import are_equal, cast_for_autocast, register_gradients

LOGITS_AT_ONCE = 2**26
"""More than this are computed in parts, and those of a loss recomputed in the backward pass."""

_LOGITS_IN_CACHE = 2**18  # Per core.
_FEWEST_ROWS = 64  # Per core: products of fewer rows are slow.
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
    weights = [tensor for tensor in (vectors_MX, table_VX, bias_V) if tensor is not None]
    is_trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in weights)
    # With fewer rows than features, the logits are smaller than the table, and fusing is no faster.
    is_small = len(vectors_MX) < vectors_MX.shape[1]
    if not (is_trained and vectors_MX.is_cpu) or is_small:
        return _not_fused(vectors_MX, table_VX, bias_V, targets_M)
    vectors_MX, table_VX, bias_V = cast_for_autocast(vectors_MX, table_VX, bias_V)
    losses: Tensor = _losses_and_gradients(vectors_MX, table_VX, bias_V, targets_M)[0]
    return losses


def rows_at_once(num_logits: int) -> int:
    """Number of rows, with `num_logits` logits each, whose logits may be in memory together."""
    return max(1, LOGITS_AT_ONCE // num_logits)


def _not_fused(vectors_MX: Tensor, table_VX: Tensor, bias_V: Tensor | None, targets_M: Tensor) -> Tensor:
    def losses(vectors_RX: Tensor, targets_R: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(vectors_RX, table_VX, bias_V).float(), targets_R, reduction="none")

    num_rows = rows_at_once(len(table_VX))
    if len(vectors_MX) <= num_rows:
        return losses(vectors_MX, targets_M)
    parts = zip(vectors_MX.split(num_rows), targets_M.split(num_rows), strict=True)
    return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])


@torch.library.custom_op("calm::cross_entropy", mutates_args=())
def _losses_and_gradients(
    vectors: Tensor, table: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, (M,), and the gradients of their sum w.r.t. the vectors, the table and the bias."""
    return _in_parts(vectors, table, bias, targets)


@torch.library.custom_op("calm::cross_entropy_backward", mutates_args=())
def _weighted_gradients(
    weights: Tensor,
    vectors: Tensor,
    table: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    grad_vectors: Tensor,
    grad_table: Tensor,
    grad_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a weighted sum of the losses, given those of the unweighted sum.

    If the weights differ, those of the table and the bias are recomputed, for two thirds of the FLOPs.
    """
    if are_equal(weights):
        weight = weights[0]
        return grad_vectors * weight, grad_table * weight, grad_bias * weight
    _, _, grad_table, grad_bias = _in_parts(vectors, table, bias, targets, weights)
    return grad_vectors * weights.unsqueeze(-1).to(grad_vectors.dtype), grad_table, grad_bias


def _in_parts(
    vectors_MX: Tensor,
    table_VX: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    weights_M: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and gradients, a few rows at a time; with weights, only the gradients of the table and the bias.

    Besides its outputs, memory holds the logits and probabilities of some rows, at most `LOGITS_AT_ONCE`
    each; with a bias, a second table and its gradient; in half precision, another table and a partial
    gradient. The table is not copied per core.
    """
    losses_M, grad_vectors_MX, grad_table_VX, grad_bias_V = _allocate_outputs(vectors_MX, table_VX)
    if bias_V is None:
        features_MY, matrix_VY, grad_matrix_VY = vectors_MX, table_VX, grad_table_VX
    else:  # The bias is the weight of one more feature that is always 1.
        features_MY = F.pad(vectors_MX, (0, 1), value=1)
        matrix_VY = torch.cat([table_VX, bias_V.unsqueeze(-1)], dim=-1)
        grad_matrix_VY = torch.empty_like(matrix_VY, dtype=torch.float32)
    grad_matrix_VY.zero_()
    is_float32 = table_VX.dtype == torch.float32
    # In half precision, products would copy a transposed view once per core.
    matrix_YV = matrix_VY.t() if is_float32 else matrix_VY.t().contiguous()
    cores = torch.get_num_threads()
    num_rows = _rows_of_part(vectors_MX, table_VX, cores)
    # All parts reuse these buffers: writing to fresh memory is slower than everything else done with it.
    logits_buffer = vectors_MX.new_empty(num_rows, len(table_VX))
    p_buffer = torch.empty_like(logits_buffer, dtype=torch.float32)
    for first in range(0, len(vectors_MX), num_rows):
        part = slice(first, first + num_rows)
        targets_R1 = targets_M[part].unsqueeze(-1)
        logits_RV, p_RV = logits_buffer[: len(targets_R1)], p_buffer[: len(targets_R1)]
        _multiply(features_MY[part], matrix_YV, logits_RV, cores)
        torch.softmax(logits_RV, -1, dtype=torch.float32, out=p_RV)
        losses_M[part] = _losses(logits_RV, p_RV, targets_R1)
        # The gradient w.r.t. the logits is p, minus 1 at the target. It overwrites p or, if converted to
        # another type, the logits.
        grad_logits_RV = p_RV.scatter_add_(1, targets_R1, p_RV.new_full((), -1).expand_as(targets_R1))
        if weights_M is not None:
            grad_logits_RV *= weights_M[part].unsqueeze(-1)
        if not is_float32:
            grad_logits_RV = logits_RV.copy_(grad_logits_RV)
        if weights_M is None:
            _multiply(grad_logits_RV, table_VX, grad_vectors_MX[part], cores)
        if is_float32:
            grad_matrix_VY.addmm_(grad_logits_RV.t(), features_MY[part])
        else:
            grad_matrix_VY += grad_logits_RV.t() @ features_MY[part]
    if bias_V is None:
        grad_bias_V.zero_()
    else:
        grad_table_VX.copy_(grad_matrix_VY[:, :-1])
        grad_bias_V.copy_(grad_matrix_VY[:, -1])
    return losses_M, grad_vectors_MX, grad_table_VX, grad_bias_V


def _rows_of_part(vectors_MX: Tensor, table_VX: Tensor, cores: int) -> int:
    """Number of rows to process at once, a multiple of the number of cores."""
    vocab_size, size = table_VX.shape
    in_cache = max(_FEWEST_ROWS, _LOGITS_IN_CACHE // vocab_size) * cores
    if table_VX.dtype == torch.float32:
        worth_a_pass = min(size, _ROWS_OF_WIDE_VECTORS)
    else:
        worth_a_pass = min(4 * size, _ROWS_IN_HALF_PRECISION)
    num_rows = min(max(in_cache, worth_a_pass), LOGITS_AT_ONCE // vocab_size, len(vectors_MX))
    return max(num_rows // cores, 1) * cores


def _multiply(rows_RX: Tensor, matrix_XY: Tensor, out_RY: Tensor, cores: int) -> None:
    """Matrix product into `out_RY`, with an equal share of the rows on each core if they divide evenly.

    So the same core processes the same rows in all products and the softmax, and logits stay in its cache.
    """
    num_shares = 1 if len(rows_RX) % cores else cores
    shares_SRX, out_SRY = (rows.unflatten(0, (num_shares, -1)) for rows in (rows_RX, out_RY))
    torch.bmm(shares_SRX, matrix_XY.expand(num_shares, -1, -1), out=out_SRY)


def _losses(logits_RV: Tensor, p_RV: Tensor, targets_R1: Tensor) -> Tensor:
    """Cross-entropy of each row, (R,), from logits and their softmax."""
    p_R1 = p_RV.gather(1, targets_R1)
    losses_R1 = -p_R1.log()
    if bool((p_R1 < _ROUNDED).any()):  # The likeliest token, whose p is never 0, gives the log-sum-exp.
        log_sum_R1 = logits_RV.amax(-1, keepdim=True).float() - p_RV.amax(-1, keepdim=True).log()
        losses_R1 = torch.where(p_R1 < _ROUNDED, log_sum_R1 - logits_RV.gather(1, targets_R1), losses_R1)
    return losses_R1.squeeze(-1)


def _allocate_outputs(vectors: Tensor, table: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        vectors.new_empty(len(vectors), dtype=torch.float32),
        torch.empty_like(vectors, memory_format=torch.contiguous_format),
        torch.empty_like(table, dtype=torch.float32, memory_format=torch.contiguous_format),
        table.new_empty(len(table), dtype=torch.float32),
    )


register_gradients(_losses_and_gradients, _weighted_gradients, _allocate_outputs)


@register_flop_formula(torch.ops.calm.cross_entropy)
def _flops(vectors: torch.Size, table: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of the logits and both gradients."""
    return 6 * vectors[0] * table[0] * table[1]
