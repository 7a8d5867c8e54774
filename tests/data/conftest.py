"""A fixture that makes even a small text be prepared in many pieces."""

import pytest

from calm.data import pieces, sources


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "_DOCUMENTS_PER_PIECE", 25)
    monkeypatch.setattr(sources, "_GROUP_BYTES_PER_PROCESS", 1)
