"""Training on streamed text: interrupted and resumed, and on two processes."""

import json
import re

import pytest
from processes import launch
from safetensors.torch import load_file
from toy import failure, toy_recipe

from calm.data.prepared import load_prepared
from calm.data.stories import stories
from calm.training import stages
from calm.training.recipe_files import with_settings, write_recipe
from calm.training.trainer import ChunkTrainer

STAGES = ("autoencoder", "language_model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    documents = list(stories(0, 40))
    for number in range(4):
        part = documents[number::4]
        lines = (json.dumps({"text": document}) + "\n" for document in part)
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


def recipe_of(text, num_workers=0, **more):
    changes = {"data.streaming": True, "data.sample_documents": 6, "data.window_documents": 4, **more}
    changes |= {f"{stage}.training.num_workers": num_workers for stage in STAGES}
    return with_settings(toy_recipe(text), changes)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("stage", "step"), [("autoencoder", 5), ("language_model", 7)])
def test_resumed_equals_uninterrupted(text, tmp_path, monkeypatch, num_workers, stage, step):
    recipe = recipe_of(text, num_workers)
    uninterrupted = stages.train(recipe, tmp_path / "uninterrupted")
    data = load_prepared(tmp_path / "uninterrupted/data")
    assert len(data.train) + len(data.validation) == 4 * 6  # The sample.
    original = ChunkTrainer.training_step

    def interrupted(self, model, inputs, num_items_in_batch=None):
        if self.args.output_dir.endswith(stage) and self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, model, inputs, num_items_in_batch)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe, tmp_path / "stopped")
    resumed = stages.train(recipe, tmp_path / "stopped", resume=True)
    first, second = (load_file(folder / "model.safetensors") for folder in (uninterrupted, resumed))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


def test_baseline_trains_on_a_stream(text, tmp_path):
    recipe = recipe_of(text, model="autoregressive", chunk_size=1)
    assert (stages.train(recipe, tmp_path / "run") / "model.safetensors").is_file()


def with_gaps(text, folder):
    """The same text with a record without text before each document."""
    folder.mkdir()
    for file in text.iterdir():
        lines = file.read_text().splitlines(keepends=True)
        (folder / file.name).write_text("".join('{"text": null}\n' + line for line in lines))
    return folder


def test_skipped_records_without_text_are_counted_in_the_log(text, tmp_path, caplog):
    steps = {"language_model.training.batch_tokens": 4096, "language_model.training.evaluate_every": 0}
    recipe = recipe_of(with_gaps(text, tmp_path / "gaps"), model="autoregressive", chunk_size=1, **steps)
    with caplog.at_level("INFO"):
        stages.train(recipe, tmp_path / "run")
    messages = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert messages == [
        "text: skipped 24 records without text",  # One before each document of the sample, six per file.
        "text: skipped 40 records without text while streaming",  # Each counts once, in two epochs.
    ]


def test_each_of_two_processes_saves_its_position_in_the_text(text, tmp_path):
    write_recipe(recipe_of(with_gaps(text, tmp_path / "gaps"), 2), tmp_path / "recipe.yaml")
    result = launch(2, "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "two")
    assert result.returncode == 0, result.stderr[-3000:]
    checkpoint = tmp_path / "two/checkpoints/language_model/checkpoint-8"
    positions = [json.loads((checkpoint / f"position_{rank}.json").read_text()) for rank in (0, 1)]
    assert all(position["num_processes"] == 2 and len(position["places"]) == 2 for position in positions)
    # Once per stage, for all processes together.
    assert len(re.findall(r"text: skipped \d+ records without text while streaming", result.stderr)) == 2


def test_prepared_text_and_tiny_samples_cannot_be_streamed(text, tmp_path, capsys):
    write_recipe(recipe_of(text), tmp_path / "recipe.yaml")
    stages.train(recipe_of(text), tmp_path / "run")
    command = ["train", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "again"]
    data = tmp_path / "run/data"
    assert "is prepared text; streaming needs the raw text" in failure(
        capsys, *command, "--data.sources", data
    )
    assert "at least 2 sample_documents" in failure(capsys, *command, "--data.sample_documents", "1")
