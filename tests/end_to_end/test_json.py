"""The output of commands with --json."""

import json
import math

import pytest
import torch

from calm.cli import main


def test_samples_as_json(capsys):
    """Three for each prompt; the first is what a single sample would be."""
    options = ["--seed", "1", "--temperature", "1", "--max_new_tokens", "8"]
    main(["generate", "stories", "Once", "There was", "-n", "3", "--json", *options])
    written = json.loads(capsys.readouterr().out)
    samples = written.pop("samples")
    assert written == {"model": "stories", "temperature": 1, "seed": 1}
    assert [sample["prompt"] for sample in samples] == ["Once"] * 3 + ["There was"] * 3
    assert len({sample["text"] for sample in samples}) > 4
    main(["generate", "stories", "There was", *options])
    assert capsys.readouterr().out == f"There was{samples[3]['text']}\n"


def test_figures_as_json(root, baseline, capsys):
    """The figures are those of the tables, and nothing else is printed."""

    def figures(*arguments):
        main([*map(str, arguments), "--json"])
        return json.loads(capsys.readouterr().out)

    options = ["--context", "64", "--ngrams", "[2]"]
    main(["evaluate", str(root / "run"), str(root / "run/data"), *options])
    table = capsys.readouterr().out
    card = figures("evaluate", root / "run", root / "run/data", *options)
    assert f"{card['brier_1']:.2f}±{card['standard_errors']['brier_1']:.2f}" in table
    assert f"{card['floors']['2-gram']['brier_2']:.2f}" in table
    floor = card["floors"]["2-gram"]["perplexity"]
    assert math.log(floor["perplexity"]) == pytest.approx(floor["cross_entropy"])
    assert f"{card['chunks']:,} held-out chunks" in table and card["context"] == 64
    assert f"{card['reconstruction']['token_accuracy']:.3f}%" in table and card["perplexity"] is None
    plain = figures("evaluate", baseline, root / "run/data", "--max_blocks", "2", *options)
    plain_floor = plain["floors"]["2-gram"]["perplexity"]
    assert plain_floor["num_tokens"] == plain["perplexity"]["num_tokens"] < floor["num_tokens"]
    assert plain["reconstruction"] is None
    assert math.log(plain["perplexity"]["perplexity"]) == pytest.approx(plain["perplexity"]["cross_entropy"])
    costs = figures("flops", root / "run", "--draws", "50")
    assert costs["inference_with_draws"]["head"] > costs["inference"]["head"] and costs["chunk_size"] == 4
    assert "inference_with_draws" not in figures("flops", baseline)
    assert figures("doctor")["versions"]["torch"] == torch.__version__
