"""Emulates on the CPU what torch does differently on a GPU, as far as it affects memory."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

# "CUDA Ops that can autocast to float32" in https://docs.pytorch.org/docs/stable/amp.html; fewer on a CPU.
_IN_FLOAT32 = frozenset(
    "__pow__ __rdiv__ __rpow__ __rtruediv__ acos asin binary_cross_entropy_with_logits cosh cdist "
    "cosine_embedding_loss cosine_similarity cross_entropy cumprod cumsum dist erfinv exp expm1 group_norm "
    "hinge_embedding_loss kl_div l1_loss layer_norm log log10 log_softmax log1p log2 margin_ranking_loss "
    "mse_loss multilabel_margin_loss multi_margin_loss nll_loss norm normalize pdist poisson_nll_loss pow "
    "prod reciprocal rsqrt sinh smooth_l1_loss soft_margin_loss softmax softmin softplus sum renorm tan "
    "triplet_margin_loss".split()
)
_DEVICE_FLAGS: dict[Any, bool] = {
    Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
}


class AsGpu(TorchFunctionMode):
    """Treats CPU tensors as if on a GPU: they report being on one, and autocast follows CUDA's rules.

    Needed because torch without CUDA has no CUDA tensors, not even fake ones.

    Args:
        is_gpu: Whether to do this; False changes nothing.
    """

    def __init__(self, *, is_gpu: bool = True) -> None:
        super().__init__()
        self._is_gpu = is_gpu

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if not self._is_gpu:
            return func(*args, **kwargs)
        if func in _DEVICE_FLAGS:
            return _DEVICE_FLAGS[func]
        if getattr(func, "__name__", "") in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _in_float32, (args, kwargs))
        return func(*args, **kwargs)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
