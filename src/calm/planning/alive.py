"""Live memory of a running network: bytes of tensors by label, at their peak."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORKSPACE, GRADIENTS = "workspace", "gradients"
_INDEX, _DEVICE = torch.ops.aten.index.Tensor, torch.ops.prim.device.default


class AssumeTrueMasks(TorchDispatchMode):
    """Evaluates `x[mask]` as if the mask were all true, since the values of fake tensors are unknown."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation."""
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # A shortcut for two thirds of all calls.
            return args[0].fake_device
        if func is _INDEX:
            args = (args[0], [integers for index in args[1] for integers in _all_true(index)])
        return func(*args, **(kwargs or {}))


def _all_true(index: Tensor | None) -> list[Tensor | None]:
    """An index as `aten.index` takes it; a mask becomes integer indices, as many as if it were all true."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.zeros(index.numel(), dtype=torch.long, device=index.device)] * index.ndim


@dataclass
class _Block:
    """Memory shared by a tensor and its views."""

    size: int
    label: str
    reference: weakref.ref[torch.UntypedStorage]


class _Peak:
    """The peak of live bytes, and the blocks alive at that moment."""

    def __init__(self) -> None:
        self._size = 0
        self._blocks: list[tuple[_Block, str]] = []

    def update(self, size: int, blocks: dict[int, _Block]) -> None:
        if size > self._size:
            self._size, self._blocks = size, [(block, block.label) for block in blocks.values()]

    def by_label(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for block, label_at_peak in self._blocks:
            # Which tensors are kept for the backward pass is only known after the forward pass, so the latest
            # label counts; but a gradient was workspace until it was complete.
            label = label_at_peak if block.label == GRADIENTS else block.label
            sizes[label] = sizes.get(label, 0) + block.size
        return sizes


class AliveBytes(TorchDispatchMode):
    """Context manager that tracks the memory of every tensor that operations create in it, until it is freed.

    Tensors created before are not counted. A tensor is `WORKSPACE` until it gets another label.
    """

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[int, _Block] = {}
        self._size = self._gradients = 0
        self._peak, self._peak_without_gradients = _Peak(), _Peak()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation and record the tensors that it creates."""
        result = func(*args, **(kwargs or {}))
        outputs = [result] if isinstance(result, Tensor) else tree_leaves(result)
        storages = [leaf.untyped_storage() for leaf in outputs if isinstance(leaf, Tensor)]
        if new := [storage for storage in storages if id(storage) not in self._blocks]:
            inputs = {
                id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
            }
            for storage in new:
                if id(storage) not in inputs:
                    self._add(storage)
        return result

    def label(self, tensors: Any, label: str) -> None:
        """Label tensors, in any nested containers."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._add(storage)
                self._relabel(self._blocks[id(storage)], label)

    def label_rest(self, label: str) -> None:
        """Label all live tensors that have no label yet."""
        for block in self._blocks.values():
            if block.label == WORKSPACE:
                self._relabel(block, label)

    def peak(self) -> dict[str, int]:
        """Bytes by label at the peak."""
        self._update_peaks()
        return self._peak.by_label()

    def peak_without_gradients(self) -> dict[str, int]:
        """Bytes by label, gradients included, at the moment when everything but gradients peaks."""
        self._update_peaks()
        return self._peak_without_gradients.by_label()

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._blocks or not storage.nbytes():
            return

        def free(_: Any) -> None:
            self._update_peaks()
            block = self._blocks.pop(key)
            self._size -= block.size
            self._gradients -= block.size * (block.label == GRADIENTS)

        self._blocks[key] = _Block(storage.nbytes(), WORKSPACE, weakref.ref(storage, free))
        self._size += storage.nbytes()

    def _relabel(self, block: _Block, label: str) -> None:
        self._update_peaks()
        self._gradients += block.size * ((label == GRADIENTS) - (block.label == GRADIENTS))
        block.label = label

    def _update_peaks(self) -> None:
        """Called before the live bytes shrink or change their label, so that no peak is missed."""
        self._peak.update(self._size, self._blocks)
        self._peak_without_gradients.update(self._size - self._gradients, self._blocks)
