"""A text that a model reads once, and branches that leave it at many positions at the same time.

To score windows that take several steps, a model must continue from its own draws after every position of
the text. The text is read into the cache once; then all branches step together, as additional
queries that see the text before them and themselves (a 4D mask), so nothing is computed twice.

Shapes: B batch, T tokens, C chunks of a window's size, S units in a chunk, U = C·S units, K tokens per
unit, Q = C - 1 positions where a branch can start, P targets, X size of the reader's output for a unit.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from calm.core.chunks import have_label, number_documents
from calm.evaluation.processes import Batch
from calm.models.readers import Reader


class Text(Protocol):
    """Blocks of text that a model has read."""

    num_steps: int

    def outputs_on_text(self, step: int) -> Tensor:
        """Output that predicts unit `step` of each target, given the true text before it, (P, X)."""

    def follow(self, units_PK: Tensor) -> Tensor:
        """Extend every branch by one step and return the output after it, (P, X).

        Args:
            units_PK: Tokens of the step, one unit for each target.
        """


def read_text(reader: Reader, batch: Batch, is_target_BC: Tensor, chunk_size: int) -> Text:
    """Read blocks of text, ready for branching.

    Args:
        reader: The model.
        batch: Blocks of text whose `position_ids` count chunks of `chunk_size` tokens.
        is_target_BC: Which of chunks 1..C-1 are targets, (B, Q).
        chunk_size: Tokens of a target, a multiple of the reader's unit size.
    """
    if chunk_size == reader.unit_size:
        outputs_BCX = reader.read(batch["input_ids"], None, batch["position_ids"], None)
        return _SingleUnits(outputs_BCX[:, :-1][is_target_BC])
    return BranchedText(reader, batch, is_target_BC, chunk_size)


@dataclass
class _SingleUnits:
    """A text whose targets are single units: no branches, so no 4D mask, which not all attentions support."""

    outputs_PX: Tensor
    num_steps: int = 1

    def outputs_on_text(self, step: int) -> Tensor:
        """See `Text`."""
        return self.outputs_PX

    def follow(self, units_PK: Tensor) -> Tensor:
        """Raise IndexError: there is no second step."""
        raise IndexError("targets of one unit have no second step.")


class BranchedText:
    """A reader's outputs on a text and on branches of it; see `read_text` for the arguments."""

    def __init__(self, reader: Reader, batch: Batch, is_target_BC: Tensor, chunk_size: int) -> None:
        self._reader, self._cache, unit_size = reader, reader.new_cache(), reader.unit_size
        self._is_target_BQ = is_target_BC
        self.num_steps = chunk_size // unit_size
        has_text_BU = have_label(batch["labels"], unit_size)
        document_BU = number_documents(batch["position_ids"]).repeat_interleave(self.num_steps, dim=1)
        self._position_BU = _positions(has_text_BU, document_BU)
        index_U = torch.arange(has_text_BU.shape[1], device=has_text_BU.device)
        # Units that are only padding, in front of a document, are invisible to the model.
        self._sees_BUU = (
            (document_BU.unsqueeze(2) == document_BU.unsqueeze(1))
            & (index_U.unsqueeze(1) >= index_U)
            & has_text_BU.unsqueeze(1)
        )
        chunk_Q = torch.arange(1, document_BU.shape[1] // self.num_steps, device=index_U.device)
        self._start_Q = chunk_Q * self.num_steps - 1  # The unit before each chunk.
        self._steps_taken = 0
        self._outputs_BUX = reader.read(
            batch["input_ids"], self._additive_mask(self._sees_BUU), self._position_BU, self._cache
        )

    def outputs_on_text(self, step: int) -> Tensor:
        """See `Text`."""
        return self._outputs_BUX[:, self._start_Q + step][self._is_target_BQ]

    def follow(self, units_PK: Tensor) -> Tensor:
        """See `Text`."""
        num_rows, num_branches = self._is_target_BQ.shape
        tokens_BQK = units_PK.new_zeros(num_rows, num_branches, units_PK.shape[-1])
        tokens_BQK[self._is_target_BQ] = units_PK
        self._steps_taken += 1
        # A branch sees the text before it, and of all units added in this and earlier steps only its own.
        same_branch_QQ = torch.eye(num_branches, dtype=torch.bool, device=units_PK.device)
        sees_added = [same_branch_QQ.expand(num_rows, -1, -1)] * self._steps_taken
        mask = self._additive_mask(torch.cat([self._sees_BUU[:, self._start_Q], *sees_added], dim=-1))
        position_BQ = self._position_BU[:, self._start_Q] + self._steps_taken
        outputs_BQX = self._reader.read(tokens_BQK.flatten(1), mask, position_BQ, self._cache)
        return outputs_BQX[self._is_target_BQ]

    def _additive_mask(self, sees_BQU: Tensor) -> Tensor:
        """0 where a query sees a key, the lowest finite number elsewhere, (B, 1, Q, U)."""
        dtype = self._reader.model.dtype
        mask = torch.zeros(sees_BQU.shape, dtype=dtype, device=sees_BQU.device)
        return mask.masked_fill(~sees_BQU, torch.finfo(dtype).min).unsqueeze(1)


def _positions(has_text_BU: Tensor, document_BU: Tensor) -> Tensor:
    """Position of each unit among those of its document that contain text."""
    before_BU = has_text_BU.long().cumsum(-1) - has_text_BU.long()
    is_first_BU = torch.ones_like(has_text_BU)
    is_first_BU[:, 1:] = document_BU[:, 1:] != document_BU[:, :-1]
    before_document_BU = torch.where(is_first_BU, before_BU, 0).cummax(-1).values
    return before_BU - before_document_BU
