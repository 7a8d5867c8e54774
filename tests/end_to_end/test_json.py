"""What commands print for programs."""

import json
import math

import pytest
import torch

from calm.cli import main


def test_samples_as_json(capsys):
    """Three of each prompt; the first is the one that there would be alone."""
    how = ["--seed", "1", "--temperature", "1", "--max_new_tokens", "8"]
    main(["generate", "stories", "Once", "There was", "-n", "3", "--json", *how])
    written = json.loads(capsys.readouterr().out)
    samples = written.pop("samples")
    assert written == {"model": "stories", "temperature": 1, "seed": 1}
    assert [one["prompt"] for one in samples] == ["Once"] * 3 + ["There was"] * 3
    assert len({one["text"] for one in samples}) > 4
    main(["generate", "stories", "There was", *how])
    assert capsys.readouterr().out == f"There was{samples[3]['text']}\n"


def test_figures_as_json(room, baseline, capsys):
    """The same figures as in the tables, and nothing beside them."""

    def figures(*arguments):
        main([*map(str, arguments), "--json"])
        return json.loads(capsys.readouterr().out)

    how = ["--context", "64", "--ngrams", "[2]"]
    main(["evaluate", str(room / "run"), str(room / "run/data"), *how])
    table = capsys.readouterr().out
    card = figures("evaluate", room / "run", room / "run/data", *how)
    assert f"{card['brier_1']:.2f}±{card['standard_errors']['brier_1']:.2f}" in table
    assert f"{card['floors']['2-gram']['brier_2']:.2f}" in table
    of_floor = card["floors"]["2-gram"]["perplexity"]
    assert math.log(of_floor["perplexity"]) == pytest.approx(of_floor["cross_entropy"])
    assert f"{card['chunks']:,} held-out chunks" in table and card["context"] == 64
    assert f"{card['reconstruction']['token_accuracy']:.3f}%" in table and card["perplexity"] is None
    other = figures("evaluate", baseline, room / "run/data", "--max_blocks", "2", *how)
    same = other["floors"]["2-gram"]["perplexity"]
    assert same["num_tokens"] == other["perplexity"]["num_tokens"] < of_floor["num_tokens"]
    assert other["reconstruction"] is None
    assert math.log(other["perplexity"]["perplexity"]) == pytest.approx(other["perplexity"]["cross_entropy"])
    costs = figures("flops", room / "run", "--draws", "50")
    assert costs["inference_with_draws"]["head"] > costs["inference"]["head"] and costs["chunk_size"] == 4
    assert "inference_with_draws" not in figures("flops", baseline)
    assert figures("doctor")["versions"]["torch"] == torch.__version__
