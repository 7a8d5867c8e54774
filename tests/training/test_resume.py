"""A run that was stopped and resumed ends in exactly the weights of a run that never was."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file
from toy import interrupt, toy_recipe

from calm.cli import main
from calm.data.stories import stories
from calm.errors import InputError
from calm.training import stages
from calm.training.recipe_files import write_recipe
from calm.training.trainer import ChunkTrainer


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories(0, 12)))
    return path


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(
    ("stage", "step"), [("autoencoder", 5), ("language_model", 2), ("language_model", 7)]
)
def test_resumed_equals_uninterrupted(text, tmp_path, monkeypatch, optimizer, stage, step):
    recipe = toy_recipe(text, optimizer)
    whole = stages.train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, stage, step)
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe, tmp_path / "stopped")
    resumed = stages.train(recipe, tmp_path / "stopped", resume=True)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
    histories = [json.loads((run / "history.json").read_text()) for run in (whole.parent, resumed.parent)]
    scores = [
        [
            (entry["step"], entry["eval_brier_1"])
            for entry in history["language_model"]
            if "eval_brier_1" in entry
        ]
        for history in histories
    ]
    assert scores[0] == scores[1]
    assert [step for step, _ in scores[0]] == [3, 6, 8]


def test_a_stopped_run_prints_the_command_that_goes_on(text, tmp_path, monkeypatch, capsys):
    recipe, output = toy_recipe(text), tmp_path / "two words"
    whole = stages.train(recipe, tmp_path / "whole")
    write_recipe(recipe, tmp_path / "recipe.yaml")
    with monkeypatch.context() as patch:
        interrupt(patch, "language_model", 5)
        with pytest.raises(SystemExit) as raised:
            main(["train", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(output)])
    assert raised.value.code == 130
    (command,) = re.findall(r"to resume, run: calm (.+)", capsys.readouterr().err)
    with pytest.raises(SystemExit):  # Options are compared with the recipe of the run.
        main([*shlex.split(command), "--seed", "77"])
    assert "the recipe differs in seed" in capsys.readouterr().err
    main(shlex.split(command))
    assert (whole / "model.safetensors").read_bytes() == (output / "model/model.safetensors").read_bytes()


def test_a_run_that_could_not_begin_has_nothing_to_go_on_with(text, tmp_path, capsys):
    for arguments in (["--output", str(tmp_path / "none")], [f"--output={tmp_path / 'none'}"]):
        with pytest.raises(SystemExit) as raised:
            main(["train", "--resume", *arguments])
        said = capsys.readouterr().err
        assert raised.value.code == 2 and "go on with" not in said and "there is no run to resume" in said


def test_a_resumed_baseline_equals_an_uninterrupted_one(text, tmp_path, monkeypatch):
    recipe = dataclasses.replace(toy_recipe(text), model="autoregressive", chunk_size=1)
    whole = stages.train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, "language_model", 5)
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe, tmp_path / "stopped")
    resumed = stages.train(recipe, tmp_path / "stopped", resume=True)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all((first[name] == second[name]).all() for name in first)
    assert not (tmp_path / "whole/autoencoder").exists()


def test_a_checkpoint_that_was_not_finished_is_not_used(text, tmp_path, monkeypatch):
    """A kill while a checkpoint is written leaves the one before as the last."""
    recipe = toy_recipe(text)
    whole = stages.train(recipe, tmp_path / "whole")
    saves = []

    def torn(self, output_dir):
        saves.append(output_dir)
        if len(saves) == 3:  # Autoencoder 3 and 6 are whole, 8 is torn.
            raise KeyboardInterrupt
        return original(self, output_dir)

    original = ChunkTrainer._save_rng_state
    with monkeypatch.context() as patch:
        patch.setattr(ChunkTrainer, "_save_rng_state", torn)
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe, tmp_path / "torn")
    checkpoints = sorted(
        path.name for path in (tmp_path / "torn/checkpoints/autoencoder").glob("checkpoint-*")
    )
    assert checkpoints == ["checkpoint-3", "checkpoint-6"]
    resumed = stages.train(recipe, tmp_path / "torn", resume=True)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all((first[name] == second[name]).all() for name in first)


def test_what_a_run_leaves_behind(text, tmp_path):
    model = stages.train(toy_recipe(text), tmp_path / "run")
    assert {path.name for path in model.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "recipe.yaml",
    }  # fmt: skip
    assert not list(tmp_path.rglob("*.partial"))
    assert len(list((tmp_path / "run/checkpoints/language_model").glob("checkpoint-*"))) == 2


def test_a_run_is_not_overwritten_or_resumed_with_another_recipe(text, tmp_path):
    recipe = toy_recipe(text)
    stages.train(recipe, tmp_path / "run")
    before = (tmp_path / "run/model/model.safetensors").read_bytes()
    with pytest.raises(InputError, match="is not empty"):
        stages.train(recipe, tmp_path / "run")
    with pytest.raises(InputError, match="the recipe differs in seed"):
        stages.train(dataclasses.replace(recipe, seed=4), tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="no run to resume"):
        stages.train(recipe, tmp_path / "elsewhere", resume=True)
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == before


def test_a_given_autoencoder_is_used_and_must_fit(text, tmp_path):
    recipe = toy_recipe(text)
    first = stages.train(recipe, tmp_path / "first")
    reused = dataclasses.replace(recipe.autoencoder, path=str(first))
    second = stages.train(dataclasses.replace(recipe, autoencoder=reused), tmp_path / "second")
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all((a[name] == b[name]).all() for name in a if name.startswith("autoencoder."))
    other = dataclasses.replace(recipe, autoencoder=reused, chunk_size=2)
    with pytest.raises(InputError, match="chunks of 4 tokens, but the recipe has 2"):
        stages.train(other, tmp_path / "third")
    small = dataclasses.replace(
        recipe, autoencoder=reused, data=dataclasses.replace(recipe.data, vocab_size=400)
    )
    with pytest.raises(InputError, match="the tokenizer has 400 tokens, more than the 300"):
        stages.train(small, tmp_path / "fourth")
