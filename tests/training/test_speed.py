"""What training logs of its speed."""

import sys
import time
from types import SimpleNamespace

import torch

from calm.hardware import matrix_rate
from calm.training.speed import Speed

CPU = torch.device("cpu")


def started(flops) -> Speed:
    speed = Speed(100, flops, CPU, torch.float32)
    speed.on_train_begin(None, SimpleNamespace(global_step=5), None)
    return speed


def test_tokens_per_second_without_pauses():
    speed = started(None)
    with speed.pause():
        time.sleep(0.3)
    time.sleep(0.05)
    figures = speed.read(15)
    assert 1000 / 0.3 < figures["tokens_per_second"] <= 1000 / 0.05
    assert "utilisation" not in figures  # The FLOPs are not known.
    assert speed.read(15) == {}


def test_no_peak_memory_where_the_system_does_not_tell(monkeypatch):
    """As on Windows, which has no module `resource`."""
    monkeypatch.setitem(sys.modules, "resource", None)
    speed = started(None)
    time.sleep(0.01)
    assert speed.read(6).keys() == {"tokens_per_second"}


def test_utilisation_is_a_share_of_the_matrix_rate():
    speed = started(1e6)
    time.sleep(0.05)
    figures = speed.read(6)
    expected = figures["tokens_per_second"] * 1e6 / matrix_rate(CPU, torch.float32)
    assert abs(figures["utilisation"] - expected) < 1e-3


def test_measuring_draws_no_random_numbers():
    matrix_rate.cache_clear()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    matrix_rate(CPU, torch.float32)
    assert torch.equal(torch.rand(3), expected)
