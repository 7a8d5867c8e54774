"""Draws of chunks whose tokens are decoded lazily.

Samplers need to know two things about draws: which are equal, and the tokens of the chosen one. Telling draws
apart seldom takes all K tokens: if no other draw of the row shares its first tokens, a draw is known to
differ, whatever its other tokens are. Where decoding a token is expensive (a decoder with a large
vocabulary), skipping it pays off.

Shapes: N draws, R rows (contexts that are sampled independently), K tokens of a chunk, X size of the state
that represents a draw until its tokens are read, M draws that are read together, J tokens of each.
"""

from typing import Protocol

import torch
from torch import Tensor

_UNREAD = -1


class TokenReader(Protocol):
    """Decodes tokens of draws."""

    chunk_size: int

    def __call__(self, states_MX: Tensor, position: int) -> Tensor:
        """Tokens of each draw from `position` in 0..K-1 on, (M, J), as many as are cheap to decode."""


class Pool:
    """Independent draws of several rows, in the order they were made.

    Args:
        states_NRX: The draws: token ids (N, R, K), or states that `reader` decodes.
        reader: Decodes the tokens; None if the states are token ids.
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
        """Device of the draws."""
        return self._states_NRX.device

    def extend(self, states_NRX: Tensor) -> None:
        """Append further draws of the same rows."""
        self._states_NRX = torch.cat([self._states_NRX, states_NRX])
        self._token_NRK = torch.cat([self._token_NRK, self._unread(states_NRX)])

    def keep(self, is_kept_R: Tensor) -> None:
        """Keep the draws of some rows, and drop those of all others."""
        self._states_NRX = self._states_NRX[:, is_kept_R]
        self._token_NRK = self._token_NRK[:, is_kept_R]

    def number(self) -> Tensor:
        """Number the draws, (R, N): two draws of a row have the same number exactly if all K ids are equal.

        Numbers lie in 0..N·R-1, and no two rows share one. Tokens are read from the first position to the
        last, and only for draws that share all earlier ones with another draw of their row.
        """
        row_R = torch.arange(self.num_rows, device=self.device)
        number_M = row_R.expand(len(self), -1).flatten()  # In the order of the draws: (N, R) flattened.
        for position in range(self._token_NRK.shape[-1]):
            size_M = torch.bincount(number_M)[number_M]
            is_shared_M = size_M > 1
            self._read(position, is_shared_M.view(len(self), -1))
            token_M = self._token_NRK[..., position].flatten()
            # Unique draws keep their number, even if their next tokens were read earlier. The products stay
            # below N·R·V: no overflow, so two different chunks never get the same number.
            token_M = torch.where(is_shared_M, token_M, 0)
            number_M = torch.unique(number_M * (token_M.max() + 1) + token_M, return_inverse=True)[1]
        return number_M.view(len(self), -1).T.contiguous()

    def chunks(self, draw_M: Tensor, row_M: Tensor) -> Tensor:
        """All tokens of some draws, (M, K).

        Args:
            draw_M: Indices of the draws.
            row_M: Their rows.
        """
        is_needed_NR = torch.zeros(self._token_NRK.shape[:2], dtype=torch.bool, device=self.device)
        is_needed_NR[draw_M, row_M] = True
        for position in range(self._token_NRK.shape[-1]):
            self._read(position, is_needed_NR)
        return self._token_NRK[draw_M, row_M]

    def _read(self, position: int, is_needed_NR: Tensor) -> None:
        """Read the tokens at a position of the draws that need them, unless they were read before."""
        if self._reader is None:
            return
        is_due_NR = is_needed_NR & (self._token_NRK[..., position] == _UNREAD)
        if bool(is_due_NR.any()):
            token_MJ = self._reader(self._states_NRX[is_due_NR], position)
            self._token_NRK[..., position : position + token_MJ.shape[1]][is_due_NR] = token_MJ

    def _unread(self, states_NRX: Tensor) -> Tensor:
        if self._reader is None:
            return states_NRX
        shape = (*states_NRX.shape[:2], self._reader.chunk_size)
        return torch.full(shape, _UNREAD, dtype=torch.long, device=states_NRX.device)
