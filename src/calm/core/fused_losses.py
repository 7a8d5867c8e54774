"""Shared by losses that compute their gradients in the forward pass, such as `cross_entropy`.

An operator returns the loss of each row, and the gradients of their sum. The backward pass only scales these,
unless rows have different weights. It is an operator rather than an autograd.Function, so that compilers and
fake tensors need not trace into it.

Shapes: M rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef


def register_gradients(
    losses_and_gradients: CustomOpDef,
    weighted_gradients: CustomOpDef,
    allocate_outputs: Callable[..., tuple[Tensor, ...]],
) -> None:
    """Make an operator differentiable, and tell fake tensors the shapes of its outputs.

    Args:
        losses_and_gradients: The operator. It takes tensors (or None), then settings such as numbers, and
            returns the losses, (M,), and the gradients of their sum w.r.t. its first inputs.
        weighted_gradients: The operator of its backward pass. It takes a weight for each loss, (M,), the
            inputs of the first operator, and the gradients that it returned; it returns the gradients of the
            weighted sum.
        allocate_outputs: Allocates the outputs of the first operator, given its inputs; further arguments are
            ignored.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *gradients = output
        tensors = [value for value in inputs if value is None or isinstance(value, Tensor)]
        ctx.num_tensors, ctx.settings = len(tensors), inputs[len(tensors) :]
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *gradients)

    def backward(ctx: Any, weights: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        tensors, gradients = ctx.saved_tensors[: ctx.num_tensors], ctx.saved_tensors[ctx.num_tensors :]
        weighted = weighted_gradients(weights, *tensors, *ctx.settings, *gradients)
        pairs = zip(weighted, tensors[: len(weighted)], strict=True)
        results = [None if tensor is None else gradient.to(tensor.dtype) for gradient, tensor in pairs]
        num_inputs = len(tensors) + len(ctx.settings)
        return *results, *[None] * (num_inputs - len(results))

    losses_and_gradients.register_fake(allocate_outputs)
    weighted_gradients.register_fake(lambda weights, *inputs: allocate_outputs(*inputs)[1:])
    losses_and_gradients.register_autograd(backward, setup_context=save)


def are_equal(weights_M: Tensor) -> bool:
    """Whether all losses have the same weight, as in a mean; False if there is none."""
    return len(weights_M) > 0 and bool((weights_M == weights_M[0]).all())


def cast_for_autocast(vectors: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's type if it is on: it does not apply to custom operators."""
    tensors, device = (vectors, *others), vectors.device.type
    # Autocast does not support the meta device, and torch 2.11 cannot trace `is_autocast_available`.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)
