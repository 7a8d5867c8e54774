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

os.fsync = lambda descriptor: None  # No test has to survive a power cut.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = slow_tests()
    for item in items:
        if item.nodeid.startswith(slow):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Imported modules stay, so later garbage collections need not scan them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _empty_compile_cache(tmp_path_factory, monkeypatch):
    """Tests do not see what the user has compiled."""
    monkeypatch.setenv("CALM_CACHE", str(tmp_path_factory.getbasetemp() / "no_cache"))


@pytest.fixture(autouse=True)
def _propagating_logger():
    """Lets `caplog` see the package's messages, even if an earlier test has run `main`, which hides them."""
    logging.getLogger("calm").propagate = True


@pytest.fixture
def model() -> CalmForCausalLM:
    return tiny_model()
