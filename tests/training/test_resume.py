"""A run that was interrupted and resumed ends with exactly the weights of an uninterrupted one."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import interrupt, toy_recipe

from calm.cli import main
from calm.data.stories import write_stories
from calm.errors import InputError
from calm.training import stages
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.recipe import Recipe, effect_of
from calm.training.recipe_files import read_recipe, with_settings, write_recipe
from calm.training.trainer import ChunkTrainer


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    write_stories(path, 0, 12)
    return path


def train_until_killed(recipe: Recipe, run: Path, monkeypatch, stage: str, step: int, **settings) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, stage, step)
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe, run, **settings)


def assert_equal_weights(first: Path, second: Path) -> None:
    weights, others = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert weights.keys() == others.keys()
    assert all((weights[name] == others[name]).all() for name in weights)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(
    ("stage", "step"), [("autoencoder", 5), ("language_model", 2), ("language_model", 7)]
)
def test_resumed_equals_uninterrupted(text, tmp_path, monkeypatch, optimizer, stage, step):
    recipe = toy_recipe(text, optimizer)
    uninterrupted = stages.train(recipe, tmp_path / "uninterrupted")
    train_until_killed(recipe, tmp_path / "stopped", monkeypatch, stage, step)
    resumed = stages.train(recipe, tmp_path / "stopped", resume=True)
    assert_equal_weights(resumed, uninterrupted)
    histories = [
        json.loads((run / "history.json").read_text()) for run in (uninterrupted.parent, resumed.parent)
    ]
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


WITHOUT_EFFECT = {
    "data.num_proc": 2,
    **{
        f"{stage}.training.{name}": value
        for stage in ("autoencoder", "language_model")
        for name, value in {"log_every": 1, "save_every": 2, "keep_checkpoints": 1, "num_workers": 1}.items()
    },
}


def test_every_setting_without_effect_on_the_weights_is_tried():
    def names_in(group, recipe, name=""):
        for field in dataclasses.fields(group):
            value, inner = getattr(group, field.name), f"{name}{field.name}"
            if dataclasses.is_dataclass(value):
                yield from names_in(value, recipe, f"{inner}.")
            elif effect_of(field, recipe) == "none":
                yield inner

    # Trackers (report_to) have tests of their own.
    assert {*names_in(Recipe(), Recipe())} == {*WITHOUT_EFFECT, "report_to"}
    language_model = [name for name in WITHOUT_EFFECT if name.startswith("language")]
    of_training = {name.removeprefix("language_model.") for name in language_model}
    assert {*names_in(FinetuningRecipe(), FinetuningRecipe())} == {*of_training, "report_to"}


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory) -> Path:
    return stages.train(toy_recipe(text), tmp_path_factory.mktemp("uninterrupted") / "run")


@pytest.mark.parametrize(
    "changes", [*({name: value} for name, value in WITHOUT_EFFECT.items()), WITHOUT_EFFECT], ids=str
)
def test_settings_without_effect_on_the_weights_may_change(
    text, uninterrupted, tmp_path, monkeypatch, changes
):
    """The run stops in that stage, resumes with other values, stops again, and resumes with the first."""
    stage = next(iter(changes)).split(".")[0]
    recipe, run = toy_recipe(text), tmp_path / "run"
    for given, step in ((recipe, 4), (with_settings(recipe, changes), 7)):
        killed_in = "language_model" if stage == "data" else stage
        train_until_killed(given, run, monkeypatch, killed_in, step, resume=given != recipe)
    assert read_recipe(str(run / "recipe.yaml")) == with_settings(recipe, changes)
    resumed = stages.train(recipe, run, resume=True)
    assert (uninterrupted / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


def test_text_prepared_again_by_more_processes_is_the_same(text, uninterrupted, tmp_path, monkeypatch):
    recipe, run = toy_recipe(text), tmp_path / "run"
    train_until_killed(recipe, run, monkeypatch, "autoencoder", 4)
    shutil.rmtree(run / "data")
    resumed = stages.train(with_settings(recipe, {"data.num_proc": 2}), run, resume=True)
    assert (uninterrupted / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", ["autoencoder", "language_model"])
def test_smaller_microbatch_warns_and_changes_only_the_rounding(
    text, uninterrupted, tmp_path, monkeypatch, caplog, stage
):
    recipe, run = toy_recipe(text), tmp_path / "run"
    train_until_killed(recipe, run, monkeypatch, stage, 5)
    setting = f"{stage}.training.microbatch_tokens"
    with caplog.at_level("WARNING", logger="calm"):
        resumed = stages.train(with_settings(recipe, {setting: 32}), run, resume=True)
    assert f"{setting} changed: the weights will differ by rounding" in caplog.text
    first, second = (load_file(folder / "model.safetensors") for folder in (uninterrupted, resumed))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=0)


def test_settings_of_streaming_must_stay_the_same(text, tmp_path):
    """The number of workers and the microbatch size decide which blocks are read together."""
    recipe = with_settings(toy_recipe(text), {"data.streaming": True})
    (tmp_path / "run").mkdir()
    write_recipe(recipe, tmp_path / "run/recipe.yaml")
    for setting, value in (("num_workers", 2), ("microbatch_tokens", 32)):
        name = f"language_model.training.{setting}"
        with pytest.raises(InputError, match=f"the recipe differs in {name};"):
            stages.train(with_settings(recipe, {name: value}), tmp_path / "run", resume=True)


def test_stopped_run_prints_the_command_that_resumes_it(text, tmp_path, monkeypatch, capsys):
    recipe, output = toy_recipe(text), tmp_path / "two words"
    uninterrupted = stages.train(recipe, tmp_path / "uninterrupted")
    write_recipe(recipe, tmp_path / "recipe.yaml")
    with monkeypatch.context() as patch:
        interrupt(patch, "language_model", 5)
        with pytest.raises(SystemExit) as raised:
            main(["train", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(output)])
    assert raised.value.code == 130
    (command,) = re.findall(r"to resume, run: calm (.+)", capsys.readouterr().err)
    with pytest.raises(SystemExit):  # Options are still compared with the recipe of the run.
        main([*shlex.split(command), "--seed", "77"])
    assert "the recipe differs in seed" in capsys.readouterr().err
    main(shlex.split(command))
    resumed = output / "model"
    assert (uninterrupted / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


def test_failed_start_leaves_nothing_to_resume(text, tmp_path, capsys):
    for arguments in (["--output", str(tmp_path / "none")], [f"--output={tmp_path / 'none'}"]):
        with pytest.raises(SystemExit) as raised:
            main(["train", "--resume", *arguments])
        stderr = capsys.readouterr().err
        assert raised.value.code == 2 and "there is no run to resume" in stderr
        assert "to resume, run:" not in stderr


def test_a_resumed_baseline_equals_an_uninterrupted_one(text, tmp_path, monkeypatch):
    recipe = dataclasses.replace(toy_recipe(text), model="autoregressive", chunk_size=1)
    uninterrupted = stages.train(recipe, tmp_path / "uninterrupted")
    train_until_killed(recipe, tmp_path / "stopped", monkeypatch, "language_model", 5)
    resumed = stages.train(recipe, tmp_path / "stopped", resume=True)
    assert_equal_weights(resumed, uninterrupted)
    assert not (tmp_path / "uninterrupted/autoencoder").exists()


def test_incomplete_checkpoint_is_not_used(text, tmp_path, monkeypatch):
    """After a kill while a checkpoint is written, the one before is the last."""
    recipe = toy_recipe(text)
    uninterrupted = stages.train(recipe, tmp_path / "uninterrupted")
    saves = []

    def killed(self, output_dir):
        saves.append(output_dir)
        if len(saves) == 3:  # Those of steps 3 and 6 are complete, that of step 8 is not.
            raise KeyboardInterrupt
        return original(self, output_dir)

    original = ChunkTrainer._save_rng_state
    with monkeypatch.context() as patch:
        patch.setattr(ChunkTrainer, "_save_rng_state", killed)
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe, tmp_path / "killed")
    checkpoints = sorted(
        path.name for path in (tmp_path / "killed/checkpoints/autoencoder").glob("checkpoint-*")
    )
    assert checkpoints == ["checkpoint-3", "checkpoint-6"]
    resumed = stages.train(recipe, tmp_path / "killed", resume=True)
    assert_equal_weights(resumed, uninterrupted)


def test_finished_run_leaves_its_model_and_two_checkpoints(text, tmp_path):
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
    weights, others = (load_file(folder / "model.safetensors") for folder in (first, second))
    names = [name for name in weights if name.startswith("autoencoder.")]
    assert all((weights[name] == others[name]).all() for name in names)
    other = dataclasses.replace(recipe, autoencoder=reused, chunk_size=2)
    with pytest.raises(InputError, match="chunks of 4 tokens, but the recipe has 2"):
        stages.train(other, tmp_path / "third")
    small = dataclasses.replace(
        recipe, autoencoder=reused, data=dataclasses.replace(recipe.data, vocab_size=400)
    )
    with pytest.raises(InputError, match="the tokenizer has 400 tokens, more than the 300"):
        stages.train(small, tmp_path / "fourth")
