"""A two-step softmax: first a class of tokens, then a token of that class (Goodman, arXiv cs/0108006).

The probability of a token is that of its class times that of the token within its class. So a log-probability
needs the logits of all classes and of the tokens in one of them, not of the whole vocabulary: with 4,096
tokens in 64 classes, 128 instead of 4,096.

All classes have the same size G, except possibly the last. Tokens are ordered by class; the index of a token
in this order is its place.

Shapes: M rows, X size of their vectors, V vocabulary, C classes, G tokens of a class, N kinds of neighbours.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_TOKENS_AT_ONCE = 4096  # Tokens converted to double precision at once, to bound memory.
_DIRECTIONS = 48  # Dimensions of the space in which tokens with similar neighbours are close.


def losses_in_classes(
    vectors_MX: Tensor, table_WX: Tensor, bias_W: Tensor, places_M: Tensor, class_size: int, vocab_size: int
) -> Tensor:
    """Cross-entropy of each row's target token within its class, (M,), in nats.

    Args:
        vectors_MX: A vector for each row.
        table_WX: A vector for each place; W is C·G, so some at the end may belong to no token.
        bias_W: Added to the products.
        places_M: Place of each row's target token.
        class_size: G.
        vocab_size: V, the number of places that hold a token.
    """
    weights = (vectors_MX, table_WX, bias_W)
    is_trained = torch.is_grad_enabled() and any(part.requires_grad for part in weights)
    device = vectors_MX.device.type
    # Autocast does not apply to custom operators, so cast here. It does not support the meta device, and
    # torch 2.11 cannot trace `is_autocast_available`, which would tell.
    if device != "meta" and torch.is_autocast_enabled(device):
        weights = tuple(part.to(torch.get_autocast_dtype(device)) for part in weights)  # type: ignore[assignment]
    losses: Tensor = _losses_and_gradients(*weights, places_M, class_size, vocab_size, is_trained)[0]
    return losses


def places_of(tokens_V: Tensor) -> Tensor:
    """Place of each token, (V,): the inverse of the permutation of tokens."""
    places_V = torch.empty_like(tokens_V)
    return places_V.index_copy(0, tokens_V, torch.arange(len(tokens_V), device=tokens_V.device))


def classes_by_neighbours(counts_VN: Tensor, class_size: int) -> Tensor:
    """Tokens ordered by class, (V,), such that tokens with similar neighbours share a class.

    Each token is described by its positive pointwise mutual information with its neighbours; tokens are split
    in half along their principal direction, recursively.

    Args:
        counts_VN: How often each token occurred next to each kind of neighbour.
        class_size: G.
    """
    points_VD = _points_of(counts_VN)

    def halved(tokens: Tensor) -> list[Tensor]:
        classes = -(-len(tokens) // class_size)
        if classes < 2:
            return [tokens]
        centred_TD = points_VD[tokens] - points_VD[tokens].mean(0)
        along_T = centred_TD @ torch.linalg.eigh(centred_TD.T @ centred_TD).eigenvectors[:, -1]
        first, second = tokens[along_T.argsort(stable=True)].tensor_split([classes // 2 * class_size])
        return [*halved(first), *halved(second)]

    return torch.cat(halved(torch.arange(len(counts_VN))))


def _points_of(counts_VN: Tensor) -> Tensor:
    """A point of unit length for each token, (V, D)."""
    totals_N = counts_VN.sum(0, dtype=torch.float64)

    def information() -> Iterator[Tensor]:
        """Yield the positive pointwise mutual information of a few tokens at a time, (R, N)."""
        for counts_RN in counts_VN.split(_TOKENS_AT_ONCE):
            counts_RN = counts_RN.double()
            # Add-one smoothing of the expectation: counts of rare tokens say little.
            expected_RN = (counts_RN.sum(1, keepdim=True) + 1) * (totals_N + 1) / (totals_N.sum() + 1)
            yield (counts_RN / expected_RN).log_().clamp_min_(0)

    products_NN = sum(part_RN.T @ part_RN for part_RN in information())
    directions_ND = torch.linalg.eigh(products_NN).eigenvectors[:, -_DIRECTIONS:]
    points_VD = torch.cat([part_RN @ directions_ND for part_RN in information()])
    return points_VD / points_VD.norm(dim=1, keepdim=True).clamp_min(1e-9)


# Operators rather than an autograd.Function, so that compilers and fake tensors need not trace into them.


@torch.library.custom_op("calm::losses_in_classes", mutates_args=())
def _losses_and_gradients(
    vectors: Tensor,
    table: Tensor,
    bias: Tensor,
    places: Tensor,
    class_size: int,
    vocab_size: int,
    is_trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, (M,), and if `is_trained`, the gradients of their sum w.r.t. vectors, table and bias."""
    return _by_classes(vectors, table, bias, places, class_size, vocab_size, is_trained, None)


@torch.library.custom_op("calm::losses_in_classes_backward", mutates_args=())
def _gradients(
    weights: Tensor,
    vectors: Tensor,
    table: Tensor,
    bias: Tensor,
    places: Tensor,
    class_size: int,
    vocab_size: int,
    by_vectors: Tensor,
    by_table: Tensor,
    by_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a weighted sum of the losses, given those of the unweighted sum."""
    if len(weights) and bool((weights == weights[0]).all()):  # As for a mean.
        weight = weights[0]
        return by_vectors * weight, by_table * weight, by_bias * weight
    return _by_classes(vectors, table, bias, places, class_size, vocab_size, True, weights)[1:]


def _by_classes(
    vectors_MX: Tensor,
    table_WX: Tensor,
    bias_W: Tensor,
    places_M: Tensor,
    class_size: int,
    vocab_size: int,
    is_trained: bool,
    weights_M: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and gradients, class by class, with one matrix product for all rows of a class."""
    losses_M, by_vectors_MX, by_table_WX, by_bias_W = _outputs(vectors_MX, table_WX, is_trained)
    by_table_WX.zero_()
    by_bias_W.zero_()
    classes_M = places_M // class_size
    order_M = classes_M.argsort(stable=True)
    counts = torch.bincount(classes_M, minlength=-(-vocab_size // class_size)).tolist()
    for number, rows_R in enumerate(order_M.split(counts)):
        if not len(rows_R):
            continue
        tokens = slice(number * class_size, min((number + 1) * class_size, vocab_size))
        vectors_RX, table_GX = vectors_MX[rows_R], table_WX[tokens]
        log_p_RG = torch.addmm(bias_W[tokens], vectors_RX, table_GX.t()).float().log_softmax(-1)
        target_R1 = (places_M[rows_R] - tokens.start).unsqueeze(-1)
        losses_M[rows_R] = -log_p_RG.gather(1, target_R1).squeeze(-1)
        if not is_trained:
            continue
        p_RG = log_p_RG.exp_().scatter_add_(1, target_R1, log_p_RG.new_full((), -1).expand_as(target_R1))
        if weights_M is not None:
            p_RG *= weights_M[rows_R].unsqueeze(-1)
        by_bias_W[tokens] = p_RG.sum(0)
        p_RG = p_RG.to(vectors_MX.dtype)
        by_vectors_MX[rows_R] = p_RG @ table_GX
        by_table_WX[tokens] = (p_RG.t() @ vectors_RX).float()
    return losses_M, by_vectors_MX, by_table_WX, by_bias_W


def _outputs(vectors: Tensor, table: Tensor, is_trained: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate losses and gradients; the gradients are empty unless `is_trained`."""
    losses = vectors.new_empty(len(vectors), dtype=torch.float32)
    rows, places = (len(vectors), len(table)) if is_trained else (0, 0)
    return (
        losses,
        vectors.new_empty(rows, vectors.shape[1]),
        table.new_empty(places, table.shape[1], dtype=torch.float32),
        table.new_empty(places, dtype=torch.float32),
    )


@_losses_and_gradients.register_fake
def _(
    vectors: Tensor, table: Tensor, bias: Any, places: Any, size: int, vocab_size: int, is_trained: bool
) -> tuple[Tensor, ...]:
    return _outputs(vectors, table, is_trained)


@_gradients.register_fake
def _(weights: Tensor, vectors: Tensor, table: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _outputs(vectors, table, True)[1:]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.class_size, ctx.vocab_size, _ = inputs
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *gradients)


def _backward(ctx: Any, weights: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, by_vectors, by_table, by_bias = ctx.saved_tensors
    sizes = ctx.class_size, ctx.vocab_size
    by_vectors, by_table, by_bias = _gradients(weights, *tensors, *sizes, by_vectors, by_table, by_bias)
    return by_vectors, by_table.to(tensors[1].dtype), by_bias.to(tensors[2].dtype), None, None, None, None


_losses_and_gradients.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.calm.losses_in_classes)
def _flops(
    vectors: torch.Size,
    table: Any,
    bias: Any,
    places: Any,
    class_size: int,
    vocab_size: int,
    is_trained: bool,
    **_: Any,
) -> int:
    """FLOPs of the logits and both gradients, as if all classes had full size."""
    return (6 if is_trained else 2) * vectors[0] * vectors[1] * class_size
