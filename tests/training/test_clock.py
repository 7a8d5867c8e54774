"""The time of a stage, over all parts of a run that was stopped."""

import json
import time
from types import SimpleNamespace

import pytest
from toy import interrupt, toy_recipe

from calm.data.stories import write_stories
from calm.training import stages
from calm.training.clock import Clock, seconds_of


@pytest.fixture
def passed(monkeypatch):
    """A clock that a test moves forward."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def begin(clock, step, callbacks):
    state = SimpleNamespace(global_step=step, stateful_callbacks=callbacks)
    clock.on_train_begin(None, state, None)
    return state


def test_a_resumed_clock_goes_on_from_the_checkpoint(passed):
    first = Clock()
    passed(50)  # Before training begins.
    begin(first, 0, {"Clock": first.state()})
    passed(7)
    checkpoint = {"Clock": first.state()}
    passed(3)
    assert first.seconds == 10
    second = Clock()
    passed(1000)  # Nobody trains.
    begin(second, 20, json.loads(json.dumps(checkpoint)))
    passed(2)
    assert second.seconds == 9  # The three seconds after the checkpoint are lost with their steps.


def test_a_checkpoint_without_a_clock_leaves_the_time_unknown(passed):
    clock = Clock()
    state = begin(clock, 20, {})
    passed(5)
    assert clock.seconds is None
    assert state.stateful_callbacks["Clock"]["attributes"] == {
        "seconds": None
    }  # The Trainer needs its entry.


@pytest.mark.parametrize(
    ("logs", "seconds"),
    [
        ([[{"seconds": 1.0}, {"seconds": 3.5}, {"loss": 2.0}], [{"seconds": 4.0}]], 7.5),
        ([[{"train_runtime": 3.0}], [{"seconds": 4.0}]], None),
        ([[], [{"seconds": 4.0}]], None),
        ([], None),
    ],
)
def test_seconds_of_stages_are_those_logged_last_if_all_are_known(logs, seconds):
    assert seconds_of(logs) == seconds


def test_the_history_of_a_resumed_run_has_the_time_of_all_its_parts(tmp_path, monkeypatch):
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
