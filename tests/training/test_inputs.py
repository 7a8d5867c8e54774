"""A run resumes only with the inputs that it began with; otherwise the error names what changed."""

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
def stop_a_run(tmp_path, monkeypatch):
    """Trains a toy recipe, with changes, until it is interrupted; returns the recipe and the run."""
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


def modification_times(run):
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def assert_resuming_is_refused(recipe, run, changed):
    before = modification_times(run)
    with pytest.raises(InputError, match=rf"cannot resume '.*run': {changed} changed since the run began"):
        stages.train(recipe, run, resume=True)
    assert modification_times(run) == before


def test_replaced_folder_of_prepared_text_is_refused(stop_a_run, tmp_path):
    prepare([str(tmp_path / "text.jsonl")], tmp_path / "text", vocab_size=300, num_proc=1)
    recipe, run = stop_a_run(**{"data.sources": str(tmp_path / "text")})
    (tmp_path / "text").rename(tmp_path / "first")
    prepare([str(tmp_path / "other.jsonl")], tmp_path / "text", vocab_size=300, num_proc=1)
    assert_resuming_is_refused(recipe, run, r"its prepared text \(with the tokenizer\)")
    shutil.rmtree(tmp_path / "text")
    (tmp_path / "first").rename(tmp_path / "text")
    stages.train(recipe, run, resume=True)


def test_text_prepared_with_another_tokenizer_is_refused(stop_a_run, tmp_path):
    recipe, run = stop_a_run()
    shutil.rmtree(run / "data")
    prepare(
        [str(tmp_path / "text.jsonl")],
        run / "data",
        vocab_size=301,
        num_proc=1,
        validation_fraction=0.2,
        seed=3,
    )
    assert_resuming_is_refused(recipe, run, r"its prepared text \(with the tokenizer\)")


def test_deleted_text_is_prepared_again_identically(stop_a_run, tmp_path):
    recipe, run = stop_a_run()
    shutil.rmtree(run / "data")
    uninterrupted = stages.train(recipe, tmp_path / "uninterrupted")
    resumed = stages.train(recipe, run, resume=True)
    first, second = (load_file(folder / "model.safetensors") for folder in (uninterrupted, resumed))
    assert all((first[name] == second[name]).all() for name in first)


def test_streamed_text_that_has_grown_is_refused(stop_a_run, tmp_path):
    recipe, run = stop_a_run(**{"data.streaming": True})
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    assert_resuming_is_refused(recipe, run, "its streamed text")


def test_modified_autoencoder_is_refused(stop_a_run, tmp_path):
    stages.train(toy_recipe(tmp_path / "text.jsonl"), tmp_path / "first")
    recipe, run = stop_a_run(**{"autoencoder.path": str(tmp_path / "first/autoencoder")})
    file = tmp_path / "first/autoencoder/model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, file, {"format": "pt"})
    (file.parent / "checksums.json").unlink()
    assert_resuming_is_refused(recipe, run, "the autoencoder '.*autoencoder'")


def test_recipe_that_was_edited_in_the_run_is_refused(stop_a_run):
    recipe, run = stop_a_run()
    other = with_settings(recipe, {"seed": 4})
    write_recipe(other, run / "recipe.yaml")
    assert_resuming_is_refused(other, run, "its recipe")


def test_defaults_do_not_count_in_the_digest_of_a_recipe():
    """So a recipe keeps its digest when a later version adds settings."""

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
def train_another_run(tmp_path):
    """Trains another run on the same text with another seed; returns its folder."""
    recipe = with_settings(toy_recipe(tmp_path / "text.jsonl"), {"seed": 9})

    def make():
        stages.train(recipe, tmp_path / "another")
        return tmp_path / "another"

    return make


def test_autoencoder_of_another_run_is_refused(stop_a_run, train_another_run):
    recipe, run = stop_a_run()
    shutil.rmtree(run / "autoencoder")
    shutil.copytree(train_another_run() / "autoencoder", run / "autoencoder")
    assert_resuming_is_refused(recipe, run, "its autoencoder")


def test_checkpoints_of_another_run_are_refused(stop_a_run, train_another_run):
    recipe, run = stop_a_run()
    shutil.rmtree(run / "checkpoints/language_model")
    shutil.copytree(train_another_run() / "checkpoints/language_model", run / "checkpoints/language_model")
    with pytest.raises(InputError, match=r"checkpoint-\d+' belongs to another run: its recipe changed"):
        stages.train(recipe, run, resume=True)


@pytest.mark.parametrize("part", ["model", "autoencoder"])
def test_damaged_model_of_a_finished_run_is_an_error(part, stop_a_run):
    recipe, run = stop_a_run()
    stages.train(recipe, run, resume=True)
    file = run / part / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"{part}' is damaged or was modified: model\.safetensors"):
        stages.train(recipe, run, resume=True)


@pytest.mark.parametrize("part", ["model", "autoencoder"])
def test_empty_folder_does_not_count_as_trained(part, stop_a_run, tmp_path):
    recipe, run = stop_a_run()
    shutil.rmtree(run / part, ignore_errors=True)
    (run / part).mkdir()
    stages.train(recipe, run, resume=True)
    assert (run / part / "model.safetensors").is_file()


def test_run_without_a_record_of_its_inputs_resumes(stop_a_run):
    """As runs of earlier versions are; the record is written then."""
    recipe, run = stop_a_run()
    (run / "inputs.json").unlink()
    stages.train(recipe, run, resume=True)
    recorded = json.loads((run / "inputs.json").read_text())
    assert recorded.keys() == {"its recipe", "its prepared text (with the tokenizer)", "its autoencoder"}


@pytest.mark.parametrize("content", ["", "[]", "{", "\0", "[" * 100_000])
def test_damaged_record_of_the_inputs_is_named(content, stop_a_run):
    recipe, run = stop_a_run()
    (run / "inputs.json").write_text(content)
    with pytest.raises(InputError, match=r"inputs\.json' is damaged .*; restore it or move it away"):
        stages.train(recipe, run, resume=True)


@pytest.mark.parametrize("content", ["", "[]", "{", "\0"])
def test_a_damaged_history_is_set_aside(content, stop_a_run, caplog):
    recipe, run = stop_a_run()
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


def test_fine_tuning_resumes_only_with_the_same_model_and_examples(base, tmp_path, monkeypatch):
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
    original = file.read_bytes()
    weights = load_file(file)
    save_file({name: weight + 1 for name, weight in weights.items()}, file, {"format": "pt"})
    (tmp_path / "base/checksums.json").unlink()
    with pytest.raises(InputError, match=r"the model '.*base' changed since the run began"):
        finetune(recipe, tmp_path / "run", resume=True)
    file.write_bytes(original)
    finetune(dataclasses.replace(recipe), tmp_path / "run", resume=True)


EARLIER_DIGESTS = ["2f8d5374a84835e5a4aa5adee95338a1", "905d9bc69d5184c855e2aeaf4d2a944c"]


def test_runs_of_earlier_versions_resume_by_their_digest(tmp_path):
    """These digests were recorded by versions that also counted settings without effect on the weights."""
    recipe = with_settings(
        Recipe(report_to="wandb"),
        {"data.num_proc": 2, "language_model.training.save_every": 50, "language_model.training.steps": 77},
    )
    for number, digest in enumerate(EARLIER_DIGESTS):
        (tmp_path / str(number)).mkdir()
        write_atomically(tmp_path / f"{number}/inputs.json", json.dumps({"its recipe": digest}))
        check_recipe_and_inputs(tmp_path / str(number), recipe, {})
        with pytest.raises(InputError, match="its recipe changed since the run began"):
            check_recipe_and_inputs(tmp_path / str(number), with_settings(recipe, {"seed": 1}), {})


def test_order_of_the_fields_of_a_head_does_not_matter(tmp_path):
    """And a run of an earlier version, whose digest depends on the order, resumes with that order."""
    head = {"head_type": "flow", "num_blocks": 1, "frequency_size": 16}
    reordered = dict(sorted(head.items()))
    recipes = [Recipe(language_model=LanguageModelSettings(head=fields)) for fields in (head, reordered)]
    assert len({digest_of_recipe(recipe) for recipe in recipes}) == 1
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    check_recipe_and_inputs(tmp_path / "new", recipes[0], {})
    check_recipe_and_inputs(tmp_path / "new", recipes[1], {})
    unsorted_digest = digest_of_recipe(recipes[0], sort_keys=False)
    assert unsorted_digest != digest_of_recipe(recipes[0])
    write_atomically(tmp_path / "old/inputs.json", json.dumps({"its recipe": unsorted_digest}))
    check_recipe_and_inputs(tmp_path / "old", recipes[0], {})
    changed = Recipe(language_model=LanguageModelSettings(head=head | {"num_blocks": 2}))
    with pytest.raises(InputError, match="its recipe changed since the run began"):
        check_recipe_and_inputs(tmp_path / "old", changed, {})
