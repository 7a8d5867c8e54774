"""Training on many processes: `torchrun` or `accelerate launch` start them, each runs the same command."""

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """The processes of this run; alone without a launcher. The first call joins the group."""
    return PartialState(cpu=not torch.accelerator.is_available())
