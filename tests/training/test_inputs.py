"""A run goes on with what it began with, or says what is another."""

import dataclasses
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from toy import interrupt, toy_recipe

from calm.data.prepare import prepare
from calm.data.stories import write_stories
from calm.errors import InputError
from calm.storage.disk import write_atomically
from calm.training import stages
from calm.training.finetuning import finetune
from calm.training.finetuning_recipe import ExampleSettings, FinetuningRecipe
from calm.training.inputs import check_recipe_and_inputs, digest_of_recipe
from calm.training.recipe import LanguageModelSettings, Recipe, TrainingSettings
from calm.training.recipe_files import with_settings, write_recipe


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run of a toy recipe that was stopped, with its text."""
    write_stories(tmp_path / "text.jsonl", 0, 40)
    write_stories(tmp_path / "other.jsonl", 1, 40)

    def stop(**changes):
        recipe = with_settings(toy_recipe(tmp_path / "text.jsonl"), changes)
        with monkeypatch.context() as patch:
            interrupt(patch, "language_model", 5)
            with pytest.raises(KeyboardInterrupt):
                stages.train(recipe, tmp_path / "run")
        return recipe, tmp_path / "run"

    return stop


def files(run):
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def refused(recipe, run, what):
    before = files(run)
    with pytest.raises(InputError, match=rf"cannot resume '.*run': {what} changed since the run began"):
        stages.train(recipe, run, resume=True)
    assert files(run) == before


def test_another_text_in_the_place_of_a_prepared_folder(stopped, tmp_path):
    prepare([str(tmp_path / "text.jsonl")], tmp_path / "text", vocab_size=300, num_proc=1)
    recipe, run = stopped(**{"data.sources": str(tmp_path / "text")})
    (tmp_path / "text").rename(tmp_path / "first")
    prepare([str(tmp_path / "other.jsonl")], tmp_path / "text", vocab_size=300, num_proc=1)
    refused(recipe, run, r"its prepared text \(with the tokenizer\)")
    shutil.rmtree(tmp_path / "text")
    (tmp_path / "first").rename(tmp_path / "text")
    stages.train(recipe, run, resume=True)


def test_another_tokenizer(stopped, tmp_path):
    recipe, run = stopped()
    shutil.rmtree(run / "data")
    prepare(
        [str(tmp_path / "text.jsonl")],
        run / "data",
        vocab_size=301,
        num_proc=1,
        validation_fraction=0.2,
        seed=3,
    )
    refused(recipe, run, r"its prepared text \(with the tokenizer\)")


def test_text_that_is_prepared_again_is_the_same(stopped, tmp_path):
    recipe, run = stopped()
    shutil.rmtree(run / "data")
    whole = stages.train(recipe, tmp_path / "whole")
    resumed = stages.train(recipe, run, resume=True)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all((first[name] == second[name]).all() for name in first)


def test_streamed_text_that_has_grown(stopped, tmp_path):
    recipe, run = stopped(**{"data.streaming": True})
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    refused(recipe, run, "its streamed text")


def test_another_autoencoder(stopped, tmp_path):
    write_stories(tmp_path / "text.jsonl", 0, 40)
    stages.train(toy_recipe(tmp_path / "text.jsonl"), tmp_path / "first")
    recipe, run = stopped(**{"autoencoder.path": str(tmp_path / "first/autoencoder")})
    file = tmp_path / "first/autoencoder/model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, file, {"format": "pt"})
    (file.parent / "checksums.json").unlink()
    refused(recipe, run, "the autoencoder '.*autoencoder'")


def test_a_recipe_that_was_changed_in_the_run_itself(stopped):
    recipe, run = stopped()
    other = with_settings(recipe, {"seed": 4})
    write_recipe(other, run / "recipe.yaml")
    refused(other, run, "its recipe")


def test_only_what_is_set_counts_in_the_digest_of_a_recipe():
    """So a recipe is the same for a version with more settings."""

    @dataclasses.dataclass
    class Inner:
        rate: float = 0.1

    @dataclasses.dataclass
    class Older:
        seed: int = 0
        inner: Inner = dataclasses.field(default_factory=Inner)

    @dataclasses.dataclass
    class Newer(Older):
        limit: int = 5

    assert digest_of_recipe(Older(3)) == digest_of_recipe(Newer(3))
    assert digest_of_recipe(Newer(3, limit=6)) != digest_of_recipe(Newer(3))
    assert len({digest_of_recipe(Older(s, Inner(r))) for s in (0, 1) for r in (0.1, 0.2)}) == 4


@pytest.fixture
def another(tmp_path):
    """Another run, of the same text and another seed."""
    recipe = with_settings(toy_recipe(tmp_path / "text.jsonl"), {"seed": 9})

    def make():
        stages.train(recipe, tmp_path / "another")
        return tmp_path / "another"

    return make


def test_the_autoencoder_of_another_run(stopped, another):
    recipe, run = stopped()
    shutil.rmtree(run / "autoencoder")
    shutil.copytree(another() / "autoencoder", run / "autoencoder")
    refused(recipe, run, "its autoencoder")


def test_the_checkpoints_of_another_run(stopped, another):
    recipe, run = stopped()
    shutil.rmtree(run / "checkpoints/language_model")
    shutil.copytree(another() / "checkpoints/language_model", run / "checkpoints/language_model")
    with pytest.raises(InputError, match=r"checkpoint-\d+' belongs to another run: its recipe changed"):
        stages.train(recipe, run, resume=True)


@pytest.mark.parametrize("part", ["model", "autoencoder"])
def test_a_finished_part_that_is_damaged_is_not_called_finished(part, stopped):
    recipe, run = stopped()
    stages.train(recipe, run, resume=True)
    file = run / part / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"{part}' is damaged or was modified: model\.safetensors"):
        stages.train(recipe, run, resume=True)


@pytest.mark.parametrize("part", ["model", "autoencoder"])
def test_an_empty_folder_is_no_finished_part(part, stopped, tmp_path):
    recipe, run = stopped()
    shutil.rmtree(run / part, ignore_errors=True)
    (run / part).mkdir()
    stages.train(recipe, run, resume=True)
    assert (run / part / "model.safetensors").is_file()


def test_a_run_of_an_earlier_version_goes_on(stopped):
    recipe, run = stopped()
    (run / "inputs.json").unlink()
    stages.train(recipe, run, resume=True)
    noted = json.loads((run / "inputs.json").read_text())
    assert noted.keys() == {"its recipe", "its prepared text (with the tokenizer)", "its autoencoder"}


@pytest.mark.parametrize("content", ["", "[]", "{", "\0", "[" * 100_000])
def test_a_damaged_record_is_named(content, stopped):
    recipe, run = stopped()
    (run / "inputs.json").write_text(content)
    with pytest.raises(InputError, match=r"inputs\.json' is damaged .*; restore it or move it away"):
        stages.train(recipe, run, resume=True)


@pytest.mark.parametrize("content", ["", "[]", "{", "\0"])
def test_a_damaged_history_is_set_aside(content, stopped, caplog):
    recipe, run = stopped()
    (run / "history.json").write_text(content)
    stages.train(recipe, run, resume=True)
    assert json.loads((run / "history.json").read_text()).keys() == {"language_model"}
    assert (run / "damaged-history.json").read_text() == content
    assert "It was renamed to 'damaged-history.json'" in caplog.text


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_stories(folder / "text.jsonl", 0, 40)
    return stages.train(toy_recipe(folder / "text.jsonl"), folder / "run")


def test_fine_tuning_of_another_model_or_of_other_examples(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "base")
    lines = [json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) + "\n" for n in range(12)]
    (tmp_path / "examples.jsonl").write_text("".join(lines))
    recipe = FinetuningRecipe(
        model=str(tmp_path / "base"),
        examples=ExampleSettings(sources=str(tmp_path / "examples.jsonl"), context=32),
        training=TrainingSettings(steps=8, batch_tokens=64, save_every=3, evaluate_every=0),
    )
    recipe.answers.number = 0
    with monkeypatch.context() as patch:
        interrupt(patch, "checkpoints", 5)
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe, tmp_path / "run")
    (tmp_path / "examples.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match=r"its examples \(with the tokenizer\) changed since"):
        finetune(recipe, tmp_path / "run", resume=True)
    (tmp_path / "examples.jsonl").write_text("".join(lines))
    file = tmp_path / "base/model.safetensors"
    good = file.read_bytes()
    weights = load_file(file)
    save_file({name: weight + 1 for name, weight in weights.items()}, file, {"format": "pt"})
    (tmp_path / "base/checksums.json").unlink()
    with pytest.raises(InputError, match=r"the model '.*base' changed since the run began"):
        finetune(recipe, tmp_path / "run", resume=True)
    file.write_bytes(good)
    finetune(dataclasses.replace(recipe), tmp_path / "run", resume=True)


BEFORE = ["2f8d5374a84835e5a4aa5adee95338a1", "905d9bc69d5184c855e2aeaf4d2a944c"]


def test_a_run_of_before_goes_on_although_all_its_settings_are_on_record(tmp_path):
    """Also those that do not change its weights, whose digests are these."""
    recipe = with_settings(
        Recipe(report_to="wandb"),
        {"data.num_proc": 2, "language_model.training.save_every": 50, "language_model.training.steps": 77},
    )
    for number, noted in enumerate(BEFORE):
        (tmp_path / str(number)).mkdir()
        write_atomically(tmp_path / f"{number}/inputs.json", json.dumps({"its recipe": noted}))
        check_recipe_and_inputs(tmp_path / str(number), recipe, {})
        with pytest.raises(InputError, match="its recipe changed since the run began"):
            check_recipe_and_inputs(tmp_path / str(number), with_settings(recipe, {"seed": 1}), {})


def test_the_order_of_the_fields_of_a_head_means_nothing(tmp_path):
    """And a run of before, whose record kept an order, goes on with that order or with the sorted one."""
    one = {"head_type": "flow", "num_blocks": 1, "frequency_size": 16}
    other = dict(sorted(one.items()))
    recipes = [Recipe(language_model=LanguageModelSettings(head=head)) for head in (one, other)]
    assert len({digest_of_recipe(recipe) for recipe in recipes}) == 1
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    check_recipe_and_inputs(tmp_path / "new", recipes[0], {})
    check_recipe_and_inputs(tmp_path / "new", recipes[1], {})
    as_before = digest_of_recipe(recipes[0], sort_keys=False)
    assert as_before != digest_of_recipe(recipes[0])
    write_atomically(tmp_path / "old/inputs.json", json.dumps({"its recipe": as_before}))
    check_recipe_and_inputs(tmp_path / "old", recipes[0], {})
    changed = Recipe(language_model=LanguageModelSettings(head=one | {"num_blocks": 2}))
    with pytest.raises(InputError, match="its recipe changed since the run began"):
        check_recipe_and_inputs(tmp_path / "old", changed, {})
