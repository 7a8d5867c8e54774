"""`calm compare` on a ladder of toy models."""

import json
import re
import shutil
from pathlib import Path

import pytest
from toy import TOY, failure

from calm.cli import main
from calm.comparison import text as text_module
from calm.core.brier import brier_lm
from calm.data.stories import write_stories


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a recipe and some text."""
    folder = tmp_path_factory.mktemp("root")
    write_stories(folder / "text.jsonl", 0, 40)
    (folder / "toy.yaml").write_text(TOY.replace("evaluate_every: 10", "evaluate_every: 5"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "NUM_STORIES", 60)  # Of the embedded corpus.
        yield folder


@pytest.fixture(scope="module")
def ladder(root) -> Path:
    """A ladder of three toy models on 60 of the embedded stories, compared."""
    main(["compare", "--recipe", str(root / "toy.yaml"), "--chunk_sizes", "[2,8]", "--output",
          str(root / "ladder"), "--max_blocks", "4"])  # fmt: skip
    return root / "ladder"


def test_a_ladder_spends_equal_flops(ladder):
    figures = json.loads((ladder / "report.json").read_text())
    by_name = {result["name"]: result for result in figures["results"]}
    assert list(by_name) == ["K2", "K8", "baseline"]
    spent = [result["training_flops"] for result in by_name.values()]
    assert max(spent) / min(spent) < 1.15  # A toy run has few steps, so rounding matters.
    assert by_name["K2"]["card"]["reconstruction"] and not by_name["K2"]["card"]["perplexity"]
    assert by_name["baseline"]["card"]["perplexity"]["num_tokens"] > 0
    assert set(figures["floors"]) == {"3-gram", "5-gram"}
    for result in by_name.values():
        temperature_points = {point["temperature"]: point for point in result["temperature_points"]}
        assert next(iter(temperature_points)) == 1.0 and 0.5 in temperature_points
        assert temperature_points[1.0]["draws"] == 1
        assert (temperature_points[0.5]["draws"] > 1) == (result["name"] != "baseline")
        assert len(result["texts"]) == len(figures["prompts"]) == 3
        assert result["seconds"] > 0 and result["checkpoints"][-1]["flops"] == result["training_flops"]
    # Models that predict fewer tokens per step than BrierLM needs are scored on the same windows.
    assert by_name["K2"]["card"]["brier"]["num_chunks"] == by_name["baseline"]["card"]["brier"]["num_chunks"]


def test_the_report_of_a_comparison_is_self_contained(ladder):
    page = (ladder / "report.html").read_text()
    plots = sorted(path.name for path in ladder.glob("report_*.png"))
    assert plots == ["report_collision.png", "report_cost.png", "report_cross_entropy.png"]
    assert page.count("data:image/svg+xml;base64,") == 2 * 7  # Seven panels in two colour schemes.
    assert not re.search(r"(src|href)=.?http", page)
    for word in (
        "CALM, K = 2",
        "CALM, K = 8",
        "Transformer",
        "K2",
        "baseline",
        "5-gram",
        "BrierLM",
        "T = 0.5",
    ):
        assert word in page
    figures = json.loads((ladder / "report.json").read_text())
    assert figures["provenance"]["hardware"] and figures["provenance"]["software"]["calm"]
    assert page.count("<details>") == 3 and "recipe" not in figures["results"][0]


def test_compare_finished_runs_and_model_folders(ladder, root, tmp_path, capsys):
    before = (ladder / "report.html").read_bytes()
    assert "exists; choose another --output" in failure(capsys, "compare", ladder / "K2", "--output", ladder)
    assert (ladder / "report.html").read_bytes() == before
    main(["compare", str(ladder / "K2"), str(ladder / "baseline/model"), "--output", str(tmp_path),
          "--max_blocks", "2", "--temperature", "0.4", "--context", "32"])  # fmt: skip
    out = capsys.readouterr().out
    assert "blocks of 32 tokens" in out and "T = 0.4" in out
    figures = json.loads((tmp_path / "report.json").read_text())
    best = max(figures["results"], key=lambda c: brier_lm(c["card"]["brier"]["means"]))
    assert f"to {best['name']}" in out
    run, model = figures["results"]
    assert run["training_flops"] and model["training_flops"] is None and model["name"] == "model"


def test_a_comparison_is_printed_as_json(ladder, tmp_path, capsys):
    main(["compare", str(ladder / "K2"), "--output", str(tmp_path), "--context", "64", "--max_blocks", "2",
          "--json"])  # fmt: skip
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path / "report.json").read_text())
    assert [result["name"] for result in figures["results"]] == ["K2"]


def test_impossible_comparisons_are_refused(ladder, root, tmp_path, capsys):
    out = ["--output", tmp_path / "out"]
    assert "name runs to compare, or a --recipe" in failure(capsys, "compare", *out)
    assert "different names" in failure(capsys, "compare", ladder / "K2", ladder / "K2", *out)
    shutil.copytree(ladder / "K2/model", tmp_path / "alone")
    (tmp_path / "alone/recipe.yaml").unlink()
    assert "contains no prepared text" in failure(capsys, "compare", tmp_path / "alone", *out)
    assert "no config.json" in failure(capsys, "compare", ladder / "data", "--data", ladder / "data", *out)
    for temperature in ("1.5", "0", "0.004"):
        assert "temperature" in failure(capsys, "compare", ladder / "K2", "--temperature", temperature, *out)
    recipe = ["--recipe", root / "toy.yaml"]
    assert "multiple of the chunk size 6" in failure(
        capsys, "compare", *recipe, "--chunk_sizes", "[2,3]", *out
    )
    assert "a recipe for a CALM" in failure(capsys, "compare", "--recipe", "demo_baseline", *out)
    main(["prepare", str(root / "text.jsonl"), "--output", str(tmp_path / "other"), "--vocab_size", "280"])
    assert "has a different tokenizer than the text" in failure(
        capsys, "compare", ladder / "K2", "--data", tmp_path / "other", *out
    )
    assert "is used up by the autoencoder" in failure(
        capsys, "compare", "--recipe", root / "toy.yaml", "--budget", "0.01", *out
    )
    assert not (tmp_path / "out/report.html").exists()
    (root / "other.yaml").write_text(TOY.replace("data: {", f"data: {{sources: [{root / 'text.jsonl'}], "))
    assert "prepared from different sources" in failure(
        capsys, "compare", "--recipe", root / "other.yaml", "--output", ladder, "--overwrite"
    )


def test_a_ladder_uses_prepared_text(ladder, root, tmp_path):
    (root / "prepared.yaml").write_text(TOY.replace("data: {", f"data: {{sources: [{ladder / 'data'}], "))
    main(["compare", "--recipe", str(root / "prepared.yaml"), "--chunk_sizes", "[4]", "--no_baseline",
          "--output", str(tmp_path), "--max_blocks", "2"])  # fmt: skip
    assert (tmp_path / "K4/model").is_dir() and not (tmp_path / "data").exists()
