"""`calm plan`."""

import json
import re

import pytest
from toy import TOY, failure

from calm.cli import main


def planned(capsys, *arguments):
    main(["plan", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.yaml").write_text(TOY)
    return str(tmp_path / "toy.yaml")


def test_table_agrees_with_the_json(toy, capsys):
    figures = planned(capsys, toy, "--devices", "2xL4")
    main(["plan", toy, "--devices", "2xL4"])
    out = capsys.readouterr().out
    assert "2 x L4: 24.0 GB each" in out and "assumed: 40% of these FLOP/s" in out
    words = " ".join(out.split())
    for name, stage in figures["stages"].items():
        plan = stage["ways"][stage["sharing"]]
        assert f"{name}: " in out and f"bound by {plan['bound']}" in words
        assert f"{stage['steps']:,} steps of {stage['step_tokens']:,} tokens" in words
    assert "fits yes" in words and "rows at once" in words and "optimizer state" in out


def test_recipe_without_a_tokenizer_uses_its_vocab_size(toy, capsys):
    note = "the recipe names no tokenizer, so its data.vocab_size counts; see --vocab_size"
    main(["plan", toy, "--devices", "2xL4"])
    assert note in capsys.readouterr().out.splitlines()
    main(["plan", toy, "--devices", "2xL4", "--vocab_size", "5000"])
    assert "names no tokenizer" not in capsys.readouterr().out


def test_device_may_be_given_in_numbers(toy, capsys):
    numbers = ["--memory", "24", "--flops", "80", "--bandwidth", "900", "--watts", "350"]
    figures = planned(capsys, toy, "--devices", "2", *numbers, "--utilisation", "0.5", "--link", "10")
    assert figures["card"]["memory"] == 24 * 2**30 and figures["card"]["half_flops"] == 80e12
    assert figures["assumed"] == {"utilisation": 0.5, "link": 10e9}


def test_settings_change_the_recipe(toy, capsys):
    settings = ["--settings", '{"language_model.training.steps": 7, "language_model.sharded": true}']
    stage = planned(capsys, toy, "--devices", "2xL4", *settings)["stages"]["language model"]
    assert stage["steps"] == 7 and stage["sharing"] == "FSDP"


def test_changing_the_head_drops_the_fields_of_the_old_one(toy, capsys):
    planned(capsys, toy, "--devices", "L4", "--settings", '{"language_model.head.head_type": "flow"}')


def test_fine_tuning_recipe_is_planned(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: lora\ntraining: {steps: 3}\nmodel: stories\n")
    assert planned(capsys, str(recipe), "--devices", "L4")["stages"]["fine-tuning"]["steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--devices", "8xH10"], "no card 'H10'"),
        (["demo", "--devices", "4", "--memory", "24"], "add --flops, --bandwidth, --watts"),
        (["demo", "--devices", "L4", "--utilisation", "1.5"], "utilisation must be above 0 and at most 1"),
        (["demo", "--devices", "L4", "--link", "0"], "link must be above 0"),
        (["demo", "--devices", "L4", "--memory", "-1"], "memory must be above 0"),
        (["demo", "--devices", "L4", "--memory", "nan"], "memory must be a number"),
        (["demo", "--devices", "L4", "--vocab_size", "0"], "vocab_size must be at least 1"),
        (["demmo", "--devices", "L4"], "there is no recipe 'demmo'.*did you mean 'demo'"),
        (["demo", "--devices", "3xL4"], "batch_tokens must be a multiple of 1536"),
        (["demo", "--devices", "L4", "--settings", '{"sed": 1}'], "has no setting 'sed'|sed"),
        (["lora", "--devices", "L4"], "names no model"),
        (["demo"], "--devices"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(arguments, message, capsys):
    line = failure(capsys, "plan", *arguments)
    assert re.search(message, line), line
