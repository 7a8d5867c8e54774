"""Every number of every recipe has a range; a value outside it is refused before training begins."""

import dataclasses
import math
from typing import get_args, get_type_hints

import pytest
from toy import failure, toy_recipe

from calm.data.stories import write_stories
from calm.errors import InputError
from calm.ranges import Range
from calm.training import probing, stages
from calm.training.check import check_recipe
from calm.training.finetuning import finetune
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.ranges import RANGES, check_ranges
from calm.training.recipe import Recipe
from calm.training.recipe_files import read_recipe_of, with_settings, write_recipe
from calm.training.recipe_settings import shipped_recipes


def numbers_of(kind, prefix=""):
    """Dotted names of the numbers of a recipe, and whether each is an integer."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from numbers_of(hint, f"{prefix}{name}.")
        elif kinds := {int, float} & {hint, *get_args(hint)}:
            yield f"{prefix}{name}", kinds == {int}


NUMBERS = [(kind, *number) for kind in (Recipe, FinetuningRecipe) for number in numbers_of(kind)]


def test_every_number_has_a_range_and_nothing_else_has_one():
    for kind, ranges in RANGES.items():
        names = {name for name, _ in numbers_of(kind) if "." not in name}
        assert names == ranges.keys(), kind


def test_membership_and_description_of_a_range():
    assert all(value in Range(0, 1) for value in (0, 0.5, 1))
    assert not any(value in Range(0, 1) for value in (-1e-9, 1.1, math.nan, math.inf, -math.inf))
    assert 0 not in Range(0, includes_low=False) and 1 not in Range(0, 1, includes_high=False)
    assert math.inf not in Range(0) and 1e308 in Range(0)
    assert str(Range(1, 10**6)) == "at least 1 and at most 1,000,000"
    assert str(Range(0, 1, includes_low=False, includes_high=False)) == "above 0 and below 1"


@pytest.mark.parametrize(("kind", "name", "is_integer"), NUMBERS)
def test_a_number_out_of_range_is_refused_and_named(kind, name, is_integer):
    recipe = with_settings(toy_recipe("text"), {}) if kind is Recipe else FinetuningRecipe(model="model")
    *path, last = name.split(".")
    group = recipe
    for part in path:
        group = getattr(group, part)
    for value in (-1, 10**30) if is_integer else (-1.0, math.nan, math.inf):
        setattr(group, last, value)
        with pytest.raises(InputError, match=rf"^{name} must be (at least|above) .*, got {value}\.$"):
            check_ranges(recipe)


@pytest.mark.parametrize("kind", [Recipe, FinetuningRecipe])
def test_shipped_recipes_are_in_range(kind):
    for name in shipped_recipes(kind):
        check_ranges(read_recipe_of(kind, name))


def test_numbers_out_of_range_are_found_before_the_first_stage(tmp_path, capsys):
    write_stories(tmp_path / "text.jsonl", 0, 12)
    write_recipe(toy_recipe(tmp_path / "text.jsonl"), tmp_path / "toy.yaml")
    for option, value in (
        ("language_model.training.optimizer.beta2", "1.0"),
        ("language_model.training.log_every", "0"),
        ("language_model.training.keep_checkpoints", "-1"),
        ("language_model.training.evaluation_blocks", "0"),
        ("language_model.training.optimizer.warmup_steps", "-5"),
        ("language_model.rope_theta", "-1"),
        ("language_model.num_layers", "1000000000000"),
        ("data.num_proc", "0"),
        ("chunk_size", "0"),
        ("seed", "-1"),
    ):
        arguments = ["train", "--recipe", tmp_path / "toy.yaml", "--output", tmp_path / "run"]
        assert option in failure(capsys, *arguments, f"--{option}", value), option
    assert not (tmp_path / "run").exists()


def test_fine_tuning_checks_ranges_as_well(tmp_path):
    recipe = FinetuningRecipe(model="model")
    recipe.examples.sources = "text.jsonl"
    recipe.answers.temperature = 2
    with pytest.raises(InputError, match=r"answers\.temperature must be at least 0 and at most 1, got 2"):
        finetune(recipe, tmp_path / "run")


def test_missing_compiler_is_an_error(monkeypatch, tmp_path):
    recipe = with_settings(toy_recipe("text"), {"autoencoder.training.compile": True})
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = r"autoencoder\.training\.compile needs a C\+\+ compiler.*no-such-compiler"
    with pytest.raises(InputError, match=message):
        stages.train(recipe, tmp_path / "run")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "none"])
def test_unavailable_attention_is_an_error(attention):
    recipe = with_settings(toy_recipe("text"), {"language_model.attention": attention})
    with pytest.raises(InputError, match=r"(?i)flash|does not define a valid model"):
        check_recipe(recipe)


def test_attention_that_fails_to_train_is_an_error(monkeypatch):
    recipe = with_settings(toy_recipe("text"), {"language_model.attention": "flex_attention"})

    def fail(*_, **__):
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(probing.LlamaForCausalLM, "forward", fail)
    with pytest.raises(InputError, match=r"'flex_attention' does not work here \(no kernel"):
        check_recipe(recipe)


def test_model_larger_than_the_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(probing, "_bytes_of_memory", lambda: 10_000)
    with pytest.raises(
        InputError, match=r"parameters, whose weights alone need 0 GB, but this machine has 0 GB"
    ):
        check_recipe(toy_recipe("text"))
