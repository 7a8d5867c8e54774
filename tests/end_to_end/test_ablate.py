"""`calm ablate` on toy models."""

import json
import math

import pytest
from toy import TOY, failure

from calm.cli import main
from calm.core.brier import undefined_brier_lm
from calm.data.stories import write_stories
from calm.report.tables import with_error
from calm.training.recipe_files import read_recipe

QUESTION = """
question: Is a head of two blocks better, or another latent?
choices:
  - {name: One block, settings: {language_model.head.num_blocks: 1}, published: 4.7}
  - {name: Two blocks, settings: {language_model.head.num_blocks: 2}}
  - {name: Z = 12, settings: {autoencoder.latent_size: 12}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a recipe on some text, a question, and its answer with two seeds."""
    folder = tmp_path_factory.mktemp("root")
    write_stories(folder / "text.jsonl", 0, 40)
    (folder / "toy.yaml").write_text(TOY.replace("data: {", f"data: {{sources: [{folder / 'text.jsonl'}], "))
    (folder / "blocks.yaml").write_text(QUESTION)
    ablate(folder, "[3,4]")
    return folder


def ablate(folder, seeds, *options):
    main(["ablate", str(folder / "blocks.yaml"), "--recipe", str(folder / "toy.yaml"), "--seeds", seeds,
          "--max_blocks", "4", "--output", str(folder / "out"), *options])  # fmt: skip


def test_table_and_json_have_the_scores_of_all_runs(root):
    out = root / "out/blocks"
    figures = json.loads((out / "ablation.json").read_text())
    assert figures["question"].startswith("Is a head") and figures["seeds"] == [3, 4]
    one, two, other = figures["outcomes"]
    assert [len(outcome["scores"]) for outcome in figures["outcomes"]] == [2, 2, 2]
    assert one["published"] == 4.7 and two["published"] is None
    assert two["training_flops"] > one["training_flops"] and two["parameters"] > one["parameters"]
    assert all(seconds > 0 for outcome in (one, two, other) for seconds in outcome["seconds"])
    table = (out / "ablation.md").read_text()
    for outcome in (one, two, other):
        scores = [score["brier_lm"] for score in outcome["scores"]]
        first = with_error(scores[0], outcome["scores"][0]["error"] or math.nan)
        undefined = [undefined_brier_lm([s[f"brier_{n}"] for n in (1, 2, 3, 4)]) for s in outcome["scores"]]
        assert [score == 0 for score in scores] == [reason is not None for reason in undefined]
        first = f"undefined: {undefined[0]}" if undefined[0] else first
        assert f"| {outcome['name']} | {first} |" in table
        num_undefined = 2 - undefined.count(None)
        mean = f"undefined for {num_undefined} of 2 |" if num_undefined else f"{sum(scores) / 2:.2f} ± "
        assert f"| {mean}" in table
        brier_1 = sum(score["brier_1"] for score in outcome["scores"]) / 2
        assert f" | {brier_1:.2f} | " in table
    # Runs of a seed share an autoencoder if its settings are equal.
    assert one["scores"][0]["token_accuracy"] == two["scores"][0]["token_accuracy"]
    folders = ["One_block", "Two_blocks", "Z_12"]
    recipes = {name: read_recipe(str(out / name / "seed3/recipe.yaml")) for name in folders}
    paths = [recipes[name].autoencoder.path for name in folders]
    assert paths[0] == paths[1] != paths[2]
    assert len(list(out.glob("autoencoder-*/seed*/autoencoder"))) == 4
    assert all(recipe.seed == 3 for recipe in recipes.values())


def test_finished_runs_are_not_repeated(root):
    out = root / "out/blocks"
    before = (out / "ablation.json").read_text()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    (out / "Two_blocks/seed4/scores.json").unlink()
    ablate(root, "[3,4]")
    assert (out / "ablation.json").read_text() == before
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == times
    ablate(root, "[4]", "--only", '["Two blocks"]')
    (outcome,) = json.loads((out / "ablation.json").read_text())["outcomes"]
    assert outcome["name"] == "Two blocks" and math.isfinite(outcome["scores"][0]["brier_lm"])


def test_bad_questions_are_refused(root, tmp_path, capsys):
    def fail(text, *options):
        (tmp_path / "q.yaml").write_text(text)
        return failure(capsys, "ablate", tmp_path / "q.yaml", "--recipe", root / "toy.yaml",
                       "--output", tmp_path / "out", *options)  # fmt: skip

    assert "no ablation 'nothing'; give a .yaml file or one of: alpha" in failure(capsys, "ablate", "nothing")
    template = "question: a\nchoices: [{name: a, settings: {%s: 1}}]"
    assert "has no setting 'autoencoder.at.all'" in fail(template % "autoencoder.at.all")
    for setting in ("data.context", "seed", "autoencoder.path"):
        assert f"a choice cannot set '{setting}', which all runs share" in fail(template % setting)
    assert "num_blcks" in fail(QUESTION.replace("num_blocks: 2", "num_blcks: 2"))
    assert "num_blocks must be" in fail(QUESTION.replace("num_blocks: 2", "num_blocks: 0"))
    assert "latent_size" in fail(QUESTION.replace("latent_size: 12", "latent_size: many"))
    assert "names that differ" in fail(
        QUESTION.replace("Two blocks", "One-block").replace("One block", "One-block")
    )
    assert "choices from: One block, Two blocks" in fail(QUESTION, "--only", '["Three"]')
    assert "q.yaml': only recipes can use 'extends'; remove it" in fail(f"extends: alpha\n{QUESTION}")
    assert "quest" in fail(QUESTION.replace("question", "quest"))
    assert not (tmp_path / "out").exists()
    assert "a recipe for a CALM" in failure(
        capsys, "ablate", "alpha", "--recipe", "demo_baseline", "--output", tmp_path / "out"
    )


def test_a_run_that_is_extended_is_scored_again(root):
    """This changes the runs, so it comes last."""
    recipe, run = (root / "toy.yaml").read_text(), root / "out/blocks/One_block/seed3"

    def scores():
        ablate(root, "[3]", "--only", '["One block"]')
        (outcome,) = json.loads((root / "out/blocks/ablation.json").read_text())["outcomes"]
        return outcome["scores"]

    before = scores()
    (root / "toy.yaml").write_text(recipe.replace("steps: 20", "steps: 40"))
    after = scores()
    assert (run / "model-20").is_dir() and after != before
    (run / "scores.json").unlink()
    assert scores() == after
