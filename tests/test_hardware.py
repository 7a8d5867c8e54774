"""Rates that are measured: of arithmetic, of memory, and of what mixed precision gains."""

import pytest
import torch

from calm import hardware
from calm.hardware import matrix_rate, mixed_precision_gain, read_rate, thread_gain

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _anew():
    for rate in (matrix_rate, mixed_precision_gain, read_rate, thread_gain):
        rate.cache_clear()
    yield
    for rate in (matrix_rate, mixed_precision_gain, read_rate, thread_gain):
        rate.cache_clear()


def test_rates_are_work_through_time(monkeypatch):
    monkeypatch.setattr(hardware, "_quickest", lambda run, times: 0.5)
    monkeypatch.setattr(hardware, "_EMULATED", 0)
    assert matrix_rate(CPU, torch.float32) == 2 * 1024**3 / 0.5
    assert read_rate(CPU) == 2**28 / 0.5
    assert thread_gain() == 1


def test_emulated_types_are_not_waited_for(monkeypatch):
    sizes = []
    monkeypatch.setattr(hardware, "_EMULATED", float("inf"))
    real = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **how: sizes.append(shape[0]) or real(*shape, **how))
    assert matrix_rate(CPU, torch.float16) > 0
    assert sizes == [128]


def test_the_gain_is_a_ratio_of_the_same_work(monkeypatch):
    seconds = iter([9.0, 9.0, 3.0, 1.0, 2.0, 2.0, 3.0, 1.0, 8.0, 1.0, 1.0, 4.0])
    monkeypatch.setattr(hardware, "_quickest", lambda run, times: run() and next(seconds))
    assert mixed_precision_gain(CPU, 16) == 3  # The median of 3, 1, 3, 8 and 1/4.


def test_measuring_leaves_random_numbers_and_threads_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with torch.no_grad():
        assert mixed_precision_gain(CPU, 8) > 0
    assert torch.equal(torch.rand(3), expected)
    torch.set_num_threads(2)
    assert thread_gain() > 0
    assert torch.get_num_threads() == 2
