"""A two-step softmax: first a class of tokens, then a token of that class (Goodman, arXiv cs/0108006).

The probability of a token is that of its class times that of the token within its class. So a log-probability
needs the logits of all classes and of the tokens in one of them, not of the whole vocabulary: with 4,096
tokens in 64 classes, 128 instead of 4,096.

All classes have the same size G, except possibly the last. Tokens are ordered by class; the index of a token
in this order is its slot.

Shapes: M rows, X size of their vectors, V vocabulary, C classes, G tokens of a class, N kinds of neighbours.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from calm.core.fused_losses import are_equal, cast_for_autocast, register_gradients

_TOKENS_AT_ONCE = 4096  # Tokens converted to double precision at once, to bound memory.
_DIRECTIONS = 48  # Dimensions of the space in which tokens with similar neighbours are close.


def losses_in_classes(
    vectors_MX: Tensor, table_WX: Tensor, bias_W: Tensor, slots_M: Tensor, class_size: int, vocab_size: int
) -> Tensor:
    """Cross-entropy of each row's target token within its class, (M,), in nats.

    Args:
        vectors_MX: A vector for each row.
        table_WX: A vector for each slot; W is C·G, so some slots at the end may have no token.
        bias_W: Added to the products.
        slots_M: Slot of each row's target token.
        class_size: G.
        vocab_size: V, the number of slots that have a token.
    """
    weights = (vectors_MX, table_WX, bias_W)
    is_trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in weights)
    weights = cast_for_autocast(*weights)
    losses: Tensor = _losses_and_gradients(*weights, slots_M, class_size, vocab_size, is_trained)[0]
    return losses


def slots_of(tokens_V: Tensor) -> Tensor:
    """Slot of each token, (V,): the inverse permutation of the tokens in class order."""
    slots_V = torch.empty_like(tokens_V)
    return slots_V.index_copy(0, tokens_V, torch.arange(len(tokens_V), device=tokens_V.device))


def classes_by_neighbours(counts_VN: Tensor, class_size: int) -> Tensor:
    """Tokens ordered by class, (V,), such that tokens with similar neighbours share a class.

    Each token is described by its positive pointwise mutual information with its neighbours; tokens are split
    in half along their principal direction, recursively.

    Args:
        counts_VN: How often each token occurred next to each kind of neighbour.
        class_size: G.
    """
    points_VD = _points_of(counts_VN)

    def split(tokens_T: Tensor) -> list[Tensor]:
        num_classes = -(-len(tokens_T) // class_size)
        if num_classes < 2:
            return [tokens_T]
        centred_TD = points_VD[tokens_T] - points_VD[tokens_T].mean(0)
        projection_T = centred_TD @ torch.linalg.eigh(centred_TD.T @ centred_TD).eigenvectors[:, -1]
        sorted_T = tokens_T[projection_T.argsort(stable=True)]
        first, second = sorted_T.tensor_split([num_classes // 2 * class_size])
        return [*split(first), *split(second)]

    return torch.cat(split(torch.arange(len(counts_VN))))


def _points_of(counts_VN: Tensor) -> Tensor:
    """A point of unit length for each token, (V, D)."""
    totals_N = counts_VN.sum(0, dtype=torch.float64)

    def mutual_information() -> Iterator[Tensor]:
        """Yield the positive pointwise mutual information of a few tokens at a time, (R, N)."""
        for counts_RN in counts_VN.split(_TOKENS_AT_ONCE):
            counts_RN = counts_RN.double()
            # Add-one smoothing of the expectation: counts of rare tokens say little.
            expected_RN = (counts_RN.sum(1, keepdim=True) + 1) * (totals_N + 1) / (totals_N.sum() + 1)
            yield (counts_RN / expected_RN).log_().clamp_min_(0)

    products_NN = sum(part_RN.T @ part_RN for part_RN in mutual_information())
    directions_ND = torch.linalg.eigh(products_NN).eigenvectors[:, -_DIRECTIONS:]
    points_VD = torch.cat([part_RN @ directions_ND for part_RN in mutual_information()])
    return points_VD / points_VD.norm(dim=1, keepdim=True).clamp_min(1e-9)


@torch.library.custom_op("calm::losses_in_classes", mutates_args=())
def _losses_and_gradients(
    vectors: Tensor,
    table: Tensor,
    bias: Tensor,
    slots: Tensor,
    class_size: int,
    vocab_size: int,
    is_trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, (M,), and if `is_trained`, the gradients of their sum w.r.t. vectors, table and bias."""
    return _by_classes(vectors, table, bias, slots, class_size, vocab_size, is_trained)


@torch.library.custom_op("calm::losses_in_classes_backward", mutates_args=())
def _weighted_gradients(
    weights: Tensor,
    vectors: Tensor,
    table: Tensor,
    bias: Tensor,
    slots: Tensor,
    class_size: int,
    vocab_size: int,
    is_trained: bool,
    grad_vectors: Tensor,
    grad_table: Tensor,
    grad_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a weighted sum of the losses, given those of the unweighted sum."""
    if are_equal(weights):
        weight = weights[0]
        return grad_vectors * weight, grad_table * weight, grad_bias * weight
    return _by_classes(vectors, table, bias, slots, class_size, vocab_size, is_trained, weights)[1:]


def _by_classes(
    vectors_MX: Tensor,
    table_WX: Tensor,
    bias_W: Tensor,
    slots_M: Tensor,
    class_size: int,
    vocab_size: int,
    is_trained: bool,
    weights_M: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and gradients, weighted by `weights_M`, with one matrix product for all rows of a class."""
    losses_M, grad_vectors_MX, grad_table_WX, grad_bias_W = _allocate_outputs(
        vectors_MX, table_WX, bias_W, slots_M, class_size, vocab_size, is_trained
    )
    grad_table_WX.zero_()
    grad_bias_W.zero_()
    classes_M = slots_M // class_size
    order_M = classes_M.argsort(stable=True)
    counts = torch.bincount(classes_M, minlength=-(-vocab_size // class_size)).tolist()
    for index, rows_R in enumerate(order_M.split(counts)):
        if not len(rows_R):
            continue
        slots = slice(index * class_size, min((index + 1) * class_size, vocab_size))
        vectors_RX, table_GX = vectors_MX[rows_R], table_WX[slots]
        log_p_RG = torch.addmm(bias_W[slots], vectors_RX, table_GX.t()).float().log_softmax(-1)
        targets_R1 = (slots_M[rows_R] - slots.start).unsqueeze(-1)
        losses_M[rows_R] = -log_p_RG.gather(1, targets_R1).squeeze(-1)
        if not is_trained:
            continue
        # The gradient w.r.t. the logits is p, minus 1 at the target.
        grad_logits_RG = log_p_RG.exp_()
        grad_logits_RG.scatter_add_(1, targets_R1, grad_logits_RG.new_full((), -1).expand_as(targets_R1))
        if weights_M is not None:
            grad_logits_RG *= weights_M[rows_R].unsqueeze(-1)
        grad_bias_W[slots] = grad_logits_RG.sum(0)
        grad_logits_RG = grad_logits_RG.to(vectors_MX.dtype)
        grad_vectors_MX[rows_R] = grad_logits_RG @ table_GX
        grad_table_WX[slots] = (grad_logits_RG.t() @ vectors_RX).float()
    return losses_M, grad_vectors_MX, grad_table_WX, grad_bias_W


def _allocate_outputs(
    vectors: Tensor,
    table: Tensor,
    bias: Tensor,
    slots: Tensor,
    class_size: int,
    vocab_size: int,
    is_trained: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and gradients; the gradients are empty unless `is_trained`."""
    num_rows, num_slots = (len(vectors), len(table)) if is_trained else (0, 0)
    return (
        vectors.new_empty(len(vectors), dtype=torch.float32),
        vectors.new_empty(num_rows, vectors.shape[1]),
        table.new_empty(num_slots, table.shape[1], dtype=torch.float32),
        table.new_empty(num_slots, dtype=torch.float32),
    )


register_gradients(_losses_and_gradients, _weighted_gradients, _allocate_outputs)


@register_flop_formula(torch.ops.calm.losses_in_classes)
def _flops(
    vectors: torch.Size,
    table: Any,
    bias: Any,
    slots: Any,
    class_size: int,
    vocab_size: int,
    is_trained: bool,
    **_: Any,
) -> int:
    """FLOPs of the logits and both gradients, as if all classes had full size."""
    return (6 if is_trained else 2) * vectors[0] * vectors[1] * class_size
