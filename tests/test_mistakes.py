"""Mistakes in options and recipes are explained with the names that the user knows."""

from typing import Any, Literal

import pytest
from toy import failure

from calm.errors import InputError
from calm.mistakes import Options, explain, mistake_in, types_of, unknown, unknown_command
from calm.training.recipe import DataSettings, Recipe
from calm.training.recipe_files import read_recipe, with_settings

RECIPE = Options(types_of(Recipe))


def test_names_of_nested_settings_are_dotted():
    names = RECIPE.types
    assert names["data"] is DataSettings and names["language_model.training.optimizer.beta1"] is float
    assert "training" not in names


@pytest.mark.parametrize(
    ("name", "suggestions"),
    [
        ("language_model.hiden_size", ["language_model.hidden_size"]),
        ("hiden_size", ["autoencoder.hidden_size", "language_model.hidden_size"]),
        ("training.steps", ["autoencoder.training.steps", "language_model.training.steps"]),
        ("data.vocab_sise", ["data.vocab_size"]),
        ("langage_model", ["language_model"]),
        ("training.x", []),
        ("language_model.training.x", []),
        ("prompt", []),
        ("lr", []),
    ],
)
def test_only_similar_names_are_suggested(name, suggestions):
    for dashes in ("", "--"):
        message = unknown(RECIPE, dashes + name)
        if suggestions:
            expected = " or ".join(dashes + suggestion for suggestion in suggestions)
            assert message.endswith(f"; did you mean {expected}?")
        else:
            assert "did you mean" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo: 1", "recipe 'r.yaml': there is no setting 'foo'."),
        ("data:\n  contxt: 1", "there is no setting 'data.contxt'; did you mean data.context?"),
        ("data: hello", "data must be a mapping of settings, got 'hello'."),
        ("data: [1]", r"data must be a mapping of settings, got '\[1\]'."),
        ("data:", "data must be a mapping of settings, got null."),
        ("seed:", "seed must be a whole number, got null."),
        ("seed: 1.5", "recipe 'r.yaml': seed must be a whole number, got '1.5'."),
        ("seed: x", "seed must be a whole number, got 'x'."),
        ("autoencoder: {kl_weight: much}", "autoencoder.kl_weight must be a number, got 'much'."),
        ("data: {streaming: perhaps}", "data.streaming must be true or false, got 'perhaps'."),
        ("data: {layout: loose}", "data.layout must be documents or packed, got 'loose'."),
        ("data: {num_proc: two}", "data.num_proc must be a whole number, got 'two'."),
        ("data: {sources: {a: b}}", "data.sources must be text or a list of texts, such as"),
        ("data: {sources: [1, 2]}", r"such as \[a,b\], got '\[1, 2\]'."),
        (
            "language_model: {head: energy}",
            "language_model.head must be a mapping, such as .*, got 'energy'.",
        ),
        ("1: 2", "there is no setting '1'."),
        ("seed: 1\n  data: 2", r"the recipe 'r.yaml' is not valid YAML \(line 2: "),
        ("seed: 'a", r"is not valid YAML \(line 1: found unexpected end of stream\)."),
        ("seed: !!python/name:os.system", r"is not valid YAML \(line 1: could not determine a constructor"),
        ("a\x00", "the recipe 'r.yaml' is not valid YAML"),
        ("- a", "the recipe 'r.yaml' contains no settings; write them as 'name: value'."),
        ("hello", "contains no settings"),
        ("", "contains no settings"),
        (b"model: caf\xe9", "the recipe 'r.yaml' is not UTF-8; save it as UTF-8."),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as raised:
        read_recipe("r.yaml")
    assert "\n" not in str(raised.value) and "Parser key" not in str(raised.value)


def test_a_missing_recipe_suggests_a_similar_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"there is no recipe 'laptp'; .*; did you mean 'laptop'\?"):
        read_recipe("laptp")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("seed: 1\n")
    with pytest.raises(InputError, match=r"did you mean '.*recipe.yaml'\?"):
        read_recipe("run")


def test_valid_settings_are_accepted(tmp_path):
    for values in ({}, {"data.context": 64}, {"language_model.head.rank": 3}, {"data": {"num_proc": None}}):
        assert mistake_in(values, RECIPE) is None
    recipe = read_recipe("demo")
    (tmp_path / "r.yaml").write_text("language_model: {head: {alpha: 1e-3, name: é}}", encoding="utf-8")
    assert read_recipe(str(tmp_path / "r.yaml")).language_model.head == {"alpha": 1e-3, "name": "é"}
    assert with_settings(recipe, {"data.num_proc": None}).data.num_proc is None
    with pytest.raises(InputError, match=r"settings seed: seed must be a whole number, got null\."):
        with_settings(recipe, {"seed": None})


def test_long_values_are_shortened_and_empty_ones_are_called_nothing():
    options = Options({"seed": int, "kind": Literal["a", "b"], "any": Any}, arguments=["--seed=x"])
    assert "got 'xxx" in explain(f'Parser key "seed": Got value: {"x" * 900}', options)
    assert len(explain(f'Parser key "seed": Got value: {"x" * 900}', options)) < 120
    assert (
        explain('Parser key "seed":\n  Got value: ', options) == "--seed must be a whole number, got nothing."
    )
    assert explain("something else\n  of two lines", options) == "something else of two lines"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "language_model.uptraining",
            '{"layers":[0.5]}',
            ".uptraining.layers must be a list of whole numbers, such as [1,2], got '[0.5]'.",
        ),
        ("language_model.uptraining", '{"sink":"x"}', ".uptraining.sink must be true or false, got 'x'."),
        ("language_model.uptraining", '{"sink":" - Parser key"}', "must be true or false, got"),
        ("language_model", '{"uptraining":{"layers":"a"}}', ".uptraining.layers must be a list of"),
        (
            "language_model.training",
            '{"optimizer":{"learning_rate":"x"}}',
            "--language_model.training.optimizer.learning_rate must be a number, got 'x'.",
        ),
        ("language_model.uptraining", "[1]", ".uptraining must be a mapping of settings, got '[1]'."),
        ("language_model.uptraining", "", ".uptraining must be a mapping of settings, got nothing."),
    ],
)
def test_a_mistake_inside_a_mapping_names_the_entry(option, value, message, capsys, tmp_path):
    error = failure(capsys, "train", "--recipe", "demo", "--output", tmp_path / "run", f"--{option}", value)
    assert error.startswith("calm: error: --language_model") and message in error


def test_an_unknown_command_suggests_another():
    commands = ["train", "generate", "share"]
    assert unknown_command("trian", commands) == "there is no command 'trian'; did you mean 'train'?"
    assert unknown_command("x", commands).endswith("give one of: train, generate, share.")
    assert "options come after a command" in unknown_command("--seed", commands)
