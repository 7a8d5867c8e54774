"""Draws of chunks whose tokens are read only where they matter.

Samplers ask two things of draws: which are equal, and what the chosen one says. To tell draws apart
seldom takes all K tokens: one whose first tokens no other draw of its row shares is known to be
different, whatever its other tokens are. Where a token is expensive to find (a decoder with a large
vocabulary), it pays not to find it.

Shapes: N draws, R rows (contexts that are sampled independently), K tokens of a chunk, X what stands
for a draw until its tokens are read, M draws that are read together.
"""

from typing import Protocol

import torch
from torch import Tensor

_UNREAD = -1


class TokenReader(Protocol):
    """Finds tokens of draws."""

    chunk_size: int

    def __call__(self, states_MX: Tensor, place: int) -> Tensor:
        """Tokens of each draw from one place 0..K-1 on, (M, J), as many as are cheap to find at once."""


class Pool:
    """Independent draws of several rows, in the order in which they were made.

    Args:
        states_NRX: The draws: token ids (N, R, K), or what `reader` finds token ids in.
        reader: Finds the tokens; None where the states are token ids.
    """

    def __init__(self, states_NRX: Tensor, reader: TokenReader | None = None) -> None:
        self._reader = reader
        self._states_NRX = states_NRX
        self._token_NRK = self._unread(states_NRX)

    def __len__(self) -> int:
        return len(self._states_NRX)

    @property
    def num_rows(self) -> int:
        """Rows R."""
        return self._states_NRX.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the draws lie."""
        return self._states_NRX.device

    def extend(self, states_NRX: Tensor) -> None:
        """Add later draws of the same rows."""
        self._states_NRX = torch.cat([self._states_NRX, states_NRX])
        self._token_NRK = torch.cat([self._token_NRK, self._unread(states_NRX)])

    def keep(self, is_kept_R: Tensor) -> None:
        """Forget the draws of all other rows."""
        self._states_NRX = self._states_NRX[:, is_kept_R]
        self._token_NRK = self._token_NRK[:, is_kept_R]

    def number(self) -> Tensor:
        """A number for every draw, (R, N): equal within a row where all K ids are equal, else different.

        Numbers lie in 0..N·R-1, and two rows share none. Tokens are read from the first place to the
        last, and only of draws that share all earlier ones with another draw of their row.
        """
        row_R = torch.arange(self.num_rows, device=self.device)
        number_M = row_R.expand(len(self), -1).flatten()  # In the order of the draws: (N, R) flattened.
        for place in range(self._token_NRK.shape[-1]):
            size_M = torch.bincount(number_M)[number_M]
            is_shared_M = size_M > 1
            self._read(place, is_shared_M.view(len(self), -1))
            token_M = self._token_NRK[..., place].flatten()
            # Draws that stand alone keep their number, whatever has been read of them before. Below
            # N·R·V: no overflow, so no two chunks are ever taken for one.
            token_M = torch.where(is_shared_M, token_M, 0)
            number_M = torch.unique(number_M * (token_M.max() + 1) + token_M, return_inverse=True)[1]
        return number_M.view(len(self), -1).T.contiguous()

    def chunks(self, draw_M: Tensor, row_M: Tensor) -> Tensor:
        """All tokens of some draws, (M, K).

        Args:
            draw_M: Which draws.
            row_M: Of which rows.
        """
        is_wanted_NR = torch.zeros(self._token_NRK.shape[:2], dtype=torch.bool, device=self.device)
        is_wanted_NR[draw_M, row_M] = True
        for place in range(self._token_NRK.shape[-1]):
            self._read(place, is_wanted_NR)
        return self._token_NRK[draw_M, row_M]

    def _read(self, place: int, is_wanted_NR: Tensor) -> None:
        """Read the tokens at a place that are wanted and have not been read."""
        if self._reader is None:
            return
        is_read_NR = is_wanted_NR & (self._token_NRK[..., place] == _UNREAD)
        if bool(is_read_NR.any()):
            token_MJ = self._reader(self._states_NRX[is_read_NR], place)
            self._token_NRK[..., place : place + token_MJ.shape[1]][is_read_NR] = token_MJ

    def _unread(self, states_NRX: Tensor) -> Tensor:
        if self._reader is None:
            return states_NRX
        shape = (*states_NRX.shape[:2], self._reader.chunk_size)
        return torch.full(shape, _UNREAD, dtype=torch.long, device=states_NRX.device)
