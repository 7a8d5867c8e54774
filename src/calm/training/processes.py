"""Training on many processes: `torchrun` or `accelerate launch` start them, each runs the same command."""

from datetime import timedelta

import torch
from accelerate import PartialState

# The first process lays out the blocks of a text while the others wait; torch would give up after minutes.
_LONGEST_WAIT = timedelta(days=1)


def processes() -> PartialState:
    """The processes of this run; alone without a launcher. The first call joins the group."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)
