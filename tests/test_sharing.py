"""The model card describes the run but not the machine; exported copies; uploads with the hub's client."""

import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from toy import failure, toy_recipe

from calm.cli import main
from calm.data.chunking import BlockSettings
from calm.data.prepared import load_prepared
from calm.data.stories import write_stories
from calm.errors import InputError
from calm.evaluation.held_out import score_model
from calm.models.loading import load_model_and_tokenizer
from calm.sharing import write_card
from calm.sharing.card import public_name, repository_of
from calm.training import stages
from calm.training.recipe_files import read_recipe, with_settings


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the run of a CALM and of a baseline; its name must never be published."""
    folder = tmp_path_factory.mktemp("secret-place")
    write_stories(folder / "text.jsonl", 0, 20)
    recipe = toy_recipe(folder / "text.jsonl", "adamw")
    stages.train(recipe, folder / "run")
    stages.train(with_settings(recipe, {"model": "autoregressive", "chunk_size": 1}), folder / "plain")
    return folder


def test_the_card_describes_the_run(runs, capsys):
    about = ["--about", "It knows ships."]
    main(["share", str(runs / "run"), "--name", "small", "--license", "mit", "--ngrams", "[3]", *about])
    path = runs / "run/model/README.md"
    assert capsys.readouterr().out.splitlines()[-1] == f"card: {path}"
    card = ModelCard.load(path)
    assert (card.data.library_name, card.data.license, card.data.pipeline_tag) == (
        "calm-lm",
        "mit",
        "text-generation",
    )
    model, _ = load_model_and_tokenizer(str(runs / "run/model"))
    data = load_prepared(runs / "run/data")
    brier = score_model(model, data, BlockSettings(32, "documents", 3)).brier
    [result] = card.data.eval_results
    metric = "brier_1" if brier.undefined else "brier_lm"
    assert result.metric_type == metric
    assert result.metric_value == pytest.approx(brier.as_metrics()[metric], abs=1e-3)
    text = path.read_text()
    figures = brier.as_metrics()
    if brier.undefined:
        assert f"undefined: {brier.undefined}" in text
        del figures["brier_lm"]
    for name, figure in figures.items():
        error = brier.as_errors()[name]
        assert f"{figure:.2f}" in text and (error != error or f" ± {error:.2f}" in text)
    for words in (
        "text.jsonl",
        "8 steps of 64 tokens",
        "3-gram",
        "FLOPs by count",
        "one latent of 8 dimensions",
        "It knows ships.",
        'from_pretrained("path/to/small")',
    ):
        assert words in text, words
    assert str(runs) not in text and "secret-place" not in text, "the card names a folder of this machine"
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["seed"] == 3 and recipe["data"]["sources"] == "text.jsonl"


def test_the_card_names_the_model_that_training_began_with(runs, monkeypatch):
    recipe = toy_recipe(runs / "text.jsonl", "adamw")
    layers = {"language_model.uptraining.first_layers": 1, "language_model.uptraining.last_layers": 1}
    source = {"language_model.init_from": str(runs / "plain")}
    stages.train(with_settings(recipe, source | layers), runs / "made")
    text = write_card(runs / "made").read_text()
    assert "It began with the weights of plain." in text and "secret-place" not in text
    assert "Each step of its backbone covers 4 tokens; a head of the kind `decoder` samples" in text
    assert "base_model" not in text
    for name, repository in {
        "owner/name": "owner/name",
        "owner/name/a/file.gguf": "owner/name",
        "stories": None,
        str(runs / "plain"): None,
    }.items():
        assert repository_of(name) == repository
    named = with_settings(read_recipe(str(runs / "made/recipe.yaml")), {"language_model.init_from": "a/b"})
    monkeypatch.setattr("calm.sharing.trained.read_recipe", lambda _: named)
    assert ModelCard.load(write_card(runs / "made")).data.base_model == "a/b"


@pytest.mark.parametrize(
    ("source", "name"),
    {
        "/secret-place/run": "run",
        "~/secret-place/run/model": "run",  # Also paths that do not exist here.
        "../secret-place/text.jsonl": "text.jsonl",
        "secret-place/of/text.jsonl": "text.jsonl",
        "owner/name": "owner/name",
        "owner/name:config": "owner/name:config",
        "owner/name/file.gguf": "owner/name/file.gguf",
    }.items(),
)
def test_only_the_last_part_of_a_path_is_published(source, name):
    assert public_name(source) == name


def test_the_card_has_the_actual_counts_of_text(runs):
    """Not those that follow from the recipe's fraction."""
    counts = load_prepared(runs / "run/data").counts()
    assert 0.15 < counts.share < 0.25 and counts.documents == {"train": 16, "validation": 4}
    [line] = [line for line in write_card(runs / "run").read_text().splitlines() if "held out" in line]
    assert line == f"text.jsonl. {counts}, equal documents together."


def test_the_card_says_what_its_costs_leave_out(runs):
    words = "costs of this run do not include the training of its autoencoder."
    assert words not in write_card(runs / "run").read_text()
    settings = {"autoencoder.path": str(runs / "run/autoencoder")}
    stages.train(with_settings(toy_recipe(runs / "text.jsonl", "adamw"), settings), runs / "reused")
    assert words in write_card(runs / "reused").read_text()


def test_the_code_on_the_card_runs(runs, monkeypatch):
    path = write_card(runs / "run", name=str(runs / "run/model"))
    code = path.read_text().split("```python\n")[1].split("```")[0]
    printed = []
    exec(code.replace("print(", "printed.append("), {"printed": printed})
    assert len(printed) == 1 and isinstance(printed[0], str)


def test_a_baseline_has_a_card_too(runs):
    text = write_card(runs / "plain").read_text()
    assert "A baseline for CALM" in text or "a baseline for CALM" in text
    assert "Perplexity" in text and "autoencoder" not in text.split("## Recipe")[0]


def test_an_edited_card_is_not_overwritten(runs, capsys):
    path = write_card(runs / "run")
    path.write_text("mine")
    with pytest.raises(InputError, match="move it away"):
        write_card(runs / "run")
    assert path.read_text() == "mine"
    path.unlink()
    assert "is not a finished run" in failure(capsys, "share", runs)


def test_the_model_is_uploaded_with_its_card(runs, monkeypatch, capsys):
    import calm.sharing.publishing

    calls = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private, exist_ok))
            return f"https://hub/{name}"

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id, commit_message):
            assert path_in_repo == "recipe.yaml" and b"secret-place" not in path_or_fileobj
            assert yaml.safe_load(path_or_fileobj)["data"]["sources"] == "text.jsonl"

        def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
            assert ignore_patterns == ["recipe.yaml"]
            files = sorted(path.name for path in folder_path.iterdir())
            assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
            calls.append(repo_id)

    monkeypatch.setattr(calm.sharing.publishing, "HfApi", Hub)
    main(["share", str(runs / "run"), "--push", "me/small", "--private"])
    assert calls == [("me/small", True, True), "me/small"]
    assert capsys.readouterr().out.endswith("model: https://hub/me/small\n")
    assert '"me/small"' in (runs / "run/model/README.md").read_text()


def test_an_unreachable_hub_is_one_sentence(runs, capsys):
    """Without waiting: the tests run offline."""
    with pytest.raises(SystemExit) as raised:
        main(["share", str(runs / "run"), "--push", "me/small"])
    assert raised.value.code == 1
    error = capsys.readouterr().err
    assert "calm: error: 'me/small' could not be uploaded" in error and "hf auth login" in error
    history = json.loads((runs / "run/history.json").read_text())
    assert history.keys() == {"autoencoder", "language_model"}


def test_an_exported_copy_is_smaller_and_equal_up_to_rounding(runs, capsys, tmp_path):
    copy = tmp_path / "copy"
    main(["share", str(runs / "run"), "--export", str(copy)])
    assert capsys.readouterr().out.splitlines()[-1] == f"copy: {copy}"
    weights = [(folder / "model.safetensors").stat().st_size for folder in (copy, runs / "run/model")]
    assert weights[0] < 0.7 * weights[1]
    assert (copy / "README.md").read_text() == (runs / "run/model/README.md").read_text()
    assert "secret-place" not in (copy / "recipe.yaml").read_text()
    for folder in (copy, runs / "run/model"):
        assert str(runs) not in (folder / "config.json").read_text(), "it names a folder of this machine"
    model, _ = load_model_and_tokenizer(str(runs / "run/model"))
    copied, _ = load_model_and_tokenizer(str(copy))
    for name, weight in copied.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, model.state_dict()[name].bfloat16().float()), name
    assert "already exists" in failure(capsys, "share", runs / "run", "--export", copy)
    message = failure(capsys, "share", runs / "run", "--export", tmp_path / "b", "--dtype", "int4")
    assert "dtype must be float32, bfloat16 or float16, got 'int4'" in message


def test_bad_options_are_refused_before_scoring(runs, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("calm.sharing.write_card", lambda *_, **__: pytest.fail("a card is written"))
    (tmp_path / "file").write_text("mine")
    for options, message in {
        ("--dtype", "int8"): "dtype must be float32, bfloat16 or float16, got 'int8'",
        ("--dtype", "int8", "--export", tmp_path / "new"): "got 'int8'",
        ("--export", tmp_path): "already exists; choose another --export",
        ("--export", tmp_path / "file"): "already exists; choose another --export",
        ("--export", tmp_path / "file/copy"): f"cannot be a folder: '{tmp_path}/file' is a file",
        ("--private",): "name one with --push",
        ("--push", "small"): "'small' is not a repository name on the hub; give OWNER/NAME",
        ("--push", "me/small", "--dtype", "int8"): "got 'int8'",  # And the hub is not asked.
        ("--ngrams", "[0]"): "ngrams must be",
        ("--about", "\udce9"): "UTF-8",
        ("--name", "\udce9"): "UTF-8",
        ("--license", "\udce9"): "UTF-8",
    }.items():
        assert message in failure(capsys, "share", runs / "run", *options), options
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def finetuned(runs):
    """The folder, with two runs of `calm finetune`: of all weights, and with adapters."""
    rows = [{"prompt": f"Say {n}:", "completion": f" {n} it is."} for n in range(24)]
    (runs / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": runs / "run/model", "examples.sources": runs / "questions.jsonl", "examples.context": 32,
        "training.steps": 2, "training.batch_tokens": 64, "answers.number": 2,
    }  # fmt: skip
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    for name, lora in {"tuned": [], "adapted": ["--lora.rank", "2"]}.items():
        main(["finetune", "--recipe", "full", "--output", str(runs / name), *options, *lora])
    return runs


def test_the_card_of_a_fine_tuned_model(finetuned, capsys, tmp_path):
    (finetuned / "run/model/README.md").unlink(missing_ok=True)
    for name in ("tuned", "adapted"):
        main(["share", str(finetuned / name), "--license", "mit", "--about", "It says numbers."])
    path = finetuned / "adapted/model/README.md"
    assert capsys.readouterr().out.splitlines()[-1] == f"card: {path}"
    card, text = ModelCard.load(path), path.read_text()
    answers = [json.loads(line) for line in (finetuned / "adapted/answers.jsonl").read_text().splitlines()]
    right = 100 * sum(row["after"].strip() == row["completion"].strip() for row in answers) / len(answers)
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("exact_match", right)
    assert "fine-tuned" in card.data.tags and "base_model" not in card.data.to_dict()
    history = json.loads((finetuned / "adapted/history.json").read_text())
    loss = [entry["eval_held_out_loss"] for entry in history if "eval_held_out_loss" in entry][-1]
    for words in (
        "run, fine-tuned.",  # "run" is the name of the model.
        "questions.jsonl. 22 examples to train on (0 shortened to fit in 32 tokens), 2 held out.",
        "2 steps of 64 tokens",
        "adapters of rank 2 (both). The model here has them added",
        "It says numbers.",
        f"Loss on held-out completions: {loss:.4g}.",
        "Of 2 held-out prompts",
        json.dumps(answers[0]["completion"].strip()),
        f"prompt = tokenizer({json.dumps(answers[0]['prompt'])}",
        "model: run",
    ):
        assert words in text, words
    assert "secret-place" not in text
    assert "all weights" in (finetuned / "tuned/model/README.md").read_text()
    main(["share", str(finetuned / "tuned"), "--export", str(tmp_path / "copy")])  # Rewrites the card.
    for file in (tmp_path / "copy").glob("*.*"):
        assert b"secret-place" not in file.read_bytes(), file
    assert load_model_and_tokenizer(str(tmp_path / "copy"))


def test_prompts_may_contain_unicode_line_separators(finetuned):
    answers, card = finetuned / "adapted/answers.jsonl", finetuned / "adapted/model/README.md"
    original = answers.read_text()
    answers.write_text(original.replace("Say ", "Say\u2028\x85"))
    main(["share", str(finetuned / "adapted")])
    answers.write_text(original)
    assert 'prompt = tokenizer("Say\u2028\x85' in card.read_text()


def test_other_folders_and_damaged_runs_are_refused(finetuned, capsys, tmp_path):
    for folder in (finetuned / "run/model", finetuned, tmp_path):
        assert "is not a finished run of `calm train` or `calm finetune`" in failure(capsys, "share", folder)
    message = failure(capsys, "share", finetuned / "tuned", "--ngrams", "[3]")
    assert "leave out --ngrams and --max_blocks" in message
    answers = finetuned / "tuned/answers.jsonl"
    original = answers.read_text()
    answers.write_text("{")
    assert "is damaged" in failure(capsys, "share", finetuned / "tuned")
    answers.write_text(original)
