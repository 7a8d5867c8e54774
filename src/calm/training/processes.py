"""Distributed processes: `torchrun` or `accelerate launch` starts them, and all run the same command."""

from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

# Others wait while the first process lays out the blocks of a text; torch would time out after minutes.
_LONGEST_WAIT = timedelta(days=1)


def _restore_to_cpu(storage: Any, location: str) -> Any:
    return storage if location.startswith("cpu:") else None


# accelerate calls the CPU of process 1 "cpu:1", a location that torch 2.11 cannot load checkpoints to.
torch.serialization.register_package(100, lambda _: None, _restore_to_cpu)


def processes() -> PartialState:
    """The process group of this run; just this process without a launcher. The first call joins it."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)
