"""Text that is prepared in many small pieces."""

import pytest

from calm.data import pieces, sources


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "_DOCUMENTS_OF_A_PIECE", 25)
    monkeypatch.setattr(sources, "_BYTES_AT_ONCE", 1)
