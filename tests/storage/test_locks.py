"""Locks: one process at a time, and none outlives its process."""

import multiprocessing
import os
import signal
import time

import pytest

from calm.errors import InputError
from calm.storage.locks import locked

SPAWN = multiprocessing.get_context("spawn")


def hold(file, ready, seconds):
    with locked(file, "it"):
        ready.set()
        time.sleep(seconds)


def hold_with_a_child(file, ready, seconds):
    with locked(file, "it"):
        if os.fork():
            ready.set()
        time.sleep(seconds)


@pytest.fixture
def holder(tmp_path, request):
    """A process that holds a lock, perhaps with a child of its own."""
    ready = SPAWN.Event()
    process = SPAWN.Process(target=request.param, args=(tmp_path / "lock", ready, 30))
    process.start()
    assert ready.wait(240)  # The new process imports torch, which is slow on a busy machine.
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize("holder", [hold], indirect=True)
def test_second_process_is_told_which_process_holds_the_lock(holder, tmp_path):
    message = rf"another process is working on it \(process {holder.pid}\)"
    with pytest.raises(InputError, match=message), locked(tmp_path / "lock", "it"):
        raise AssertionError
    assert (tmp_path / "lock").is_file()


@pytest.mark.parametrize("holder", [hold, hold_with_a_child], indirect=True)
def test_a_lock_ends_with_its_process_even_if_that_leaves_children(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with locked(tmp_path / "lock", "it"):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / "lock").exists()


def test_lock_is_released_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError), locked(tmp_path / "lock", "it"):
            raise RuntimeError
    assert not (tmp_path / "lock").exists()
