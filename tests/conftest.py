"""What every test runs with: one thread, a seed, no network."""

import gc
import logging
import os

# One thread each: the suite runs in parallel, and bit-identical results need a fixed number.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from slow import slow_tests
from tiny import tiny_model

from calm.models.calm import CalmForCausalLM

os.fsync = lambda descriptor: None  # Nothing here has to outlive a power cut.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = slow_tests()
    for item in items:
        if item.nodeid.startswith(slow):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What is imported stays: every run collects garbage, and need not look through all of that again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet(tmp_path_factory, monkeypatch):
    """What the user has compiled is not looked at."""
    monkeypatch.setenv("CALM_CACHE", str(tmp_path_factory.getbasetemp() / "no_cache"))


@pytest.fixture(autouse=True)
def _notes_are_caught():
    """The command line keeps the notes of the package to itself, and an earlier test may have run it."""
    logging.getLogger("calm").propagate = True


@pytest.fixture
def model() -> CalmForCausalLM:
    return tiny_model()
