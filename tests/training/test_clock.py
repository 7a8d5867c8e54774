"""The training time of a stage, over all parts of an interrupted run."""

import json
import time
from types import SimpleNamespace

import pytest
from toy import interrupt, toy_recipe

from calm.data.stories import write_stories
from calm.training import stages
from calm.training.clock import Clock, seconds_of


@pytest.fixture
def advance(monkeypatch):
    """Moves the clock forward by a number of seconds."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def begin_training(clock, step, callbacks):
    state = SimpleNamespace(global_step=step, stateful_callbacks=callbacks)
    clock.on_train_begin(None, state, None)
    return state


def test_resumed_clock_continues_from_the_checkpoint(advance):
    first = Clock()
    advance(50)  # Before training begins.
    begin_training(first, 0, {"Clock": first.state()})
    advance(7)
    checkpoint = {"Clock": first.state()}
    advance(3)
    assert first.seconds == 10
    second = Clock()
    advance(1000)  # Nobody trains.
    begin_training(second, 20, json.loads(json.dumps(checkpoint)))
    advance(2)
    assert second.seconds == 9  # The three seconds after the checkpoint are lost with their steps.


def test_a_checkpoint_without_a_clock_leaves_the_time_unknown(advance):
    clock = Clock()
    state = begin_training(clock, 20, {})
    advance(5)
    assert clock.seconds is None
    # The Trainer needs the entry.
    assert state.stateful_callbacks["Clock"]["attributes"] == {"seconds": None}


@pytest.mark.parametrize(
    ("logs", "seconds"),
    [
        ([[{"seconds": 1.0}, {"seconds": 3.5}, {"loss": 2.0}], [{"seconds": 4.0}]], 7.5),
        ([[{"train_runtime": 3.0}], [{"seconds": 4.0}]], None),
        ([[], [{"seconds": 4.0}]], None),
        ([], None),
    ],
)
def test_seconds_are_the_sum_of_the_last_logged_if_all_are_known(logs, seconds):
    assert seconds_of(logs) == seconds


def test_history_of_a_resumed_run_includes_earlier_training_time(tmp_path, monkeypatch):
    write_stories(tmp_path / "text.jsonl", 0, 12)
    recipe = toy_recipe(tmp_path / "text.jsonl")
    with monkeypatch.context() as patch:
        interrupt(patch, "language_model", 7)
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe, tmp_path / "run")
    folder = tmp_path / "run/checkpoints/language_model/checkpoint-6"
    state = json.loads((folder / "trainer_state.json").read_text())
    before = state["stateful_callbacks"]["Clock"]["attributes"]["seconds"]
    assert before > 0
    stages.train(recipe, tmp_path / "run", resume=True)
    history = json.loads((tmp_path / "run/history.json").read_text())
    for log in history.values():
        times = [entry["seconds"] for entry in log]
        assert times == sorted(times) and len(times) > 3
    assert seconds_of([history["language_model"]]) > before
