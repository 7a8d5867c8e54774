"""Scores and callbacks of a user's own, in `train` and `finetune`."""

import json

import pytest
from toy import toy_recipe
from transformers import TrainerCallback

import calm
from calm.data.stories import write_stories

LOGGED = ("loss", "grad_norm", "learning_rate")


class Recorder(TrainerCallback):
    """Records the steps that it sees."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def losses_of(run):
    """All logged losses of a run."""
    history = json.loads((run / "history.json").read_text())
    return [
        {name: entry[name] for name in LOGGED}
        for entries in history.values()
        for entry in entries
        if "loss" in entry
    ]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    write_stories(file, 0, 12)
    return file


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory):
    """A run without hooks."""
    folder = tmp_path_factory.mktemp("plain")
    calm.train(toy_recipe(text), folder / "run")
    return folder / "run"


def test_scores_are_recorded_and_callbacks_called(text, plain, tmp_path):
    recorder, calls = Recorder(), []

    def score(model, blocks):
        calls.append((model.training, len(blocks)))
        return {"num_calls": len(calls)}

    folder = calm.train(toy_recipe(text), str(tmp_path / "run"), callbacks=[recorder], scores=[score])
    assert folder == tmp_path / "run/model"
    assert recorder.steps == list(range(1, 9))
    history = json.loads((tmp_path / "run/history.json").read_text())["language_model"]
    assert [entry["eval_num_calls"] for entry in history if "eval_num_calls" in entry] == [1, 2, 3]
    assert all("eval_brier_1" in entry for entry in history if "eval_num_calls" in entry)
    assert not any(is_training for is_training, _ in calls)
    assert all(num_blocks > 0 for _, num_blocks in calls)
    assert losses_of(tmp_path / "run") == losses_of(plain)


def test_a_score_must_not_replace_one_of_the_package(text, tmp_path):
    with pytest.raises(ValueError, match="there is a score 'brier_lm' already"):
        calm.train(toy_recipe(text), tmp_path / "run", scores=[lambda model, blocks: {"brier_lm": 1.0}])


def test_fine_tuning_takes_scores_and_callbacks_as_well(plain, tmp_path):
    records = [{"prompt": f"{number} is", "completion": f" number {number}."} for number in range(20)]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = calm.with_settings(
        calm.FinetuningRecipe(model=str(plain)),
        {
            "examples.sources": str(tmp_path / "examples.jsonl"),
            "examples.context": 32,
            "training.steps": 2,
            "training.batch_tokens": 64,
            "training.evaluate_every": 1,
            "answers.number": 1,
        },
    )
    recorder = Recorder()
    calm.finetune(
        recipe, tmp_path / "run", callbacks=[recorder], scores=[lambda model, blocks: {"constant": 7.0}]
    )
    assert recorder.steps == [1, 2]
    history = json.loads((tmp_path / "run/history.json").read_text())
    entries = (
        history if isinstance(history, list) else [entry for stage in history.values() for entry in stage]
    )
    assert [entry["eval_constant"] for entry in entries if "eval_constant" in entry] == [7.0, 7.0]
