"""The model card says what the run was, and nothing of the machine; the hub's client uploads it."""

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
    folder = tmp_path_factory.mktemp("secret-place")
    write_stories(folder / "text.jsonl", 0, 20)
    recipe = toy_recipe(folder / "text.jsonl", "adamw")
    stages.train(recipe, folder / "run")
    stages.train(with_settings(recipe, {"model": "autoregressive", "chunk_size": 1}), folder / "plain")
    return folder


def test_the_card_says_what_the_run_was(runs, capsys):
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
    assert str(runs) not in text and "secret-place" not in text, "no folder of this machine"
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["seed"] == 3 and recipe["data"]["sources"] == "text.jsonl"


def test_the_card_says_what_it_was_made_of(runs, monkeypatch):
    recipe = toy_recipe(runs / "text.jsonl", "adamw")
    cut = {"language_model.uptraining.first_layers": 1, "language_model.uptraining.last_layers": 1}
    begun = {"language_model.init_from": str(runs / "plain")}
    stages.train(with_settings(recipe, begun | cut), runs / "made")
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
        "~/secret-place/run/model": "run",  # Paths that are not here any more, or not seen from here.
        "../secret-place/text.jsonl": "text.jsonl",
        "secret-place/of/text.jsonl": "text.jsonl",
        "owner/name": "owner/name",
        "owner/name:config": "owner/name:config",
        "owner/name/file.gguf": "owner/name/file.gguf",
    }.items(),
)
def test_a_path_is_shown_by_its_last_part_wherever_it_leads(source, name):
    assert public_name(source) == name


def test_the_card_counts_the_text_that_there_was(runs):
    """Not the share that the recipe asks for."""
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


def test_the_code_of_the_card_runs(runs, monkeypatch):
    path = write_card(runs / "run", name=str(runs / "run/model"))
    code = path.read_text().split("```python\n")[1].split("```")[0]
    said = []
    exec(code.replace("print(", "said.append("), {"said": said})
    assert len(said) == 1 and isinstance(said[0], str)


def test_a_baseline_has_a_card_too(runs):
    text = write_card(runs / "plain").read_text()
    assert "A baseline for CALM" in text or "a baseline for CALM" in text
    assert "Perplexity" in text and "autoencoder" not in text.split("## Recipe")[0]


def test_a_card_of_ones_own_is_kept(runs, capsys):
    path = write_card(runs / "run")
    path.write_text("mine")
    with pytest.raises(InputError, match="move it away"):
        write_card(runs / "run")
    assert path.read_text() == "mine"
    path.unlink()
    assert "is not a finished run" in failure(capsys, "share", runs)


def test_it_is_uploaded_with_its_card(runs, monkeypatch, capsys):
    import calm.sharing.publishing

    done = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            done.append((name, private, exist_ok))
            return f"https://hub/{name}"

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id, commit_message):
            assert path_in_repo == "recipe.yaml" and b"secret-place" not in path_or_fileobj
            assert yaml.safe_load(path_or_fileobj)["data"]["sources"] == "text.jsonl"

        def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
            assert ignore_patterns == ["recipe.yaml"]
            files = sorted(path.name for path in folder_path.iterdir())
            assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
            done.append(repo_id)

    monkeypatch.setattr(calm.sharing.publishing, "HfApi", Hub)
    main(["share", str(runs / "run"), "--push", "me/small", "--private"])
    assert done == [("me/small", True, True), "me/small"]
    assert capsys.readouterr().out.endswith("model: https://hub/me/small\n")
    assert '"me/small"' in (runs / "run/model/README.md").read_text()


def test_a_hub_that_is_not_there(runs, capsys):
    """The tests run offline: one sentence, no waiting."""
    with pytest.raises(SystemExit) as raised:
        main(["share", str(runs / "run"), "--push", "me/small"])
    assert raised.value.code == 1
    said = capsys.readouterr().err
    assert "calm: error: 'me/small' could not be uploaded" in said and "hf auth login" in said
    history = json.loads((runs / "run/history.json").read_text())
    assert history.keys() == {"autoencoder", "language_model"}


def test_a_copy_in_fewer_bytes(runs, capsys, tmp_path):
    copy = tmp_path / "copy"
    main(["share", str(runs / "run"), "--export", str(copy)])
    assert capsys.readouterr().out.splitlines()[-1] == f"copy: {copy}"
    weights = [(folder / "model.safetensors").stat().st_size for folder in (copy, runs / "run/model")]
    assert weights[0] < 0.7 * weights[1]
    assert (copy / "README.md").read_text() == (runs / "run/model/README.md").read_text()
    assert "secret-place" not in (copy / "recipe.yaml").read_text()
    for folder in (copy, runs / "run/model"):
        assert str(runs) not in (folder / "config.json").read_text(), "no folder of this machine"
    model, _ = load_model_and_tokenizer(str(runs / "run/model"))
    copied, _ = load_model_and_tokenizer(str(copy))
    for name, weight in copied.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, model.state_dict()[name].bfloat16().float()), name
    assert "already exists" in failure(capsys, "share", runs / "run", "--export", copy)
    message = failure(capsys, "share", runs / "run", "--export", tmp_path / "b", "--dtype", "int4")
    assert "dtype must be float32, bfloat16 or float16, got 'int4'" in message


def test_bad_options_are_found_before_the_work(runs, capsys, tmp_path, monkeypatch):
    """The model is not scored, and no card is written."""
    monkeypatch.setattr("calm.sharing.write_card", lambda *_, **__: pytest.fail("the work has begun"))
    (tmp_path / "file").write_text("mine")
    for options, words in {
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
        assert words in failure(capsys, "share", runs / "run", *options), options
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def answering(runs):
    """A run of `calm finetune` on the model of the run, and one by adapters."""
    rows = [{"prompt": f"Say {n}:", "completion": f" {n} it is."} for n in range(24)]
    (runs / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": runs / "run/model", "examples.sources": runs / "questions.jsonl", "examples.context": 32,
        "training.steps": 2, "training.batch_tokens": 64, "answers.number": 2,
    }  # fmt: skip
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    for name, more in {"asked": [], "adapted": ["--lora.rank", "2"]}.items():
        main(["finetune", "--recipe", "full", "--output", str(runs / name), *options, *more])
    return runs


def test_the_card_of_a_fine_tuned_model(answering, capsys, tmp_path):
    (answering / "run/model/README.md").unlink(missing_ok=True)
    for name in ("asked", "adapted"):
        main(["share", str(answering / name), "--license", "mit", "--about", "It says numbers."])
    path = answering / "adapted/model/README.md"
    assert capsys.readouterr().out.splitlines()[-1] == f"card: {path}"
    card, text = ModelCard.load(path), path.read_text()
    answers = [json.loads(line) for line in (answering / "adapted/answers.jsonl").read_text().splitlines()]
    right = 100 * sum(row["after"].strip() == row["completion"].strip() for row in answers) / len(answers)
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("exact_match", right)
    assert "fine-tuned" in card.data.tags and "base_model" not in card.data.to_dict()
    history = json.loads((answering / "adapted/history.json").read_text())
    loss = [entry["eval_held_out_loss"] for entry in history if "eval_held_out_loss" in entry][-1]
    for words in (
        "run, fine-tuned.",  # The model's name is that of its run.
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
    assert "all weights" in (answering / "asked/model/README.md").read_text()
    main(
        ["share", str(answering / "asked"), "--export", str(tmp_path / "copy")]
    )  # Its own card, written anew.
    for file in (tmp_path / "copy").glob("*.*"):
        assert b"secret-place" not in file.read_bytes(), file
    assert load_model_and_tokenizer(str(tmp_path / "copy"))


def test_prompts_may_have_characters_at_which_python_splits_lines(answering):
    answers, card = answering / "adapted/answers.jsonl", answering / "adapted/model/README.md"
    whole = answers.read_text()
    answers.write_text(whole.replace("Say ", "Say\u2028\x85"))
    main(["share", str(answering / "adapted")])
    answers.write_text(whole)
    assert 'prompt = tokenizer("Say\u2028\x85' in card.read_text()


def test_what_is_no_run_to_share(answering, capsys, tmp_path):
    for folder in (answering / "run/model", answering, tmp_path):
        assert "is not a finished run of `calm train` or `calm finetune`" in failure(capsys, "share", folder)
    message = failure(capsys, "share", answering / "asked", "--ngrams", "[3]")
    assert "leave out --ngrams and --max_blocks" in message
    answers = answering / "asked/answers.jsonl"
    whole = answers.read_text()
    answers.write_text("{")
    assert "is damaged" in failure(capsys, "share", answering / "asked")
    answers.write_text(whole)
