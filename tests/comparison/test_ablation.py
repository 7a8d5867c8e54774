"""Ablations: those that are shipped, and those that users define."""

import itertools
import json

import pytest
from toy import toy_recipe, toy_source

from calm.comparison.ablation import (
    Ablation,
    Choice,
    _seconds,
    read_ablation,
    run_ablation,
    shipped_ablations,
)
from calm.comparison.costs import autoencoder_flops
from calm.data.prepared import load_prepared
from calm.data.stories import write_stories
from calm.errors import InputError
from calm.report.ablation import write_ablation
from calm.training.check import check_model
from calm.training.recipe_files import differences, read_recipe, with_settings
from calm.training.stages import train

SHIPPED = [
    "alpha",
    "backbone_input",
    "chunk_size",
    "dropout",
    "head_depth",
    "head_draws",
    "kl",
    "latent_size",
    "posterior_draws",
]


def test_shipped_ablations_are_listed():
    assert list(shipped_ablations()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_choices_give_valid_models_that_differ(name):
    recipe = read_recipe("demo")
    ablation = read_ablation(name)
    recipes = [with_settings(recipe, choice.settings) for choice in ablation.choices]
    for choice, changed in zip(ablation.choices, recipes, strict=True):
        check_model(changed)
        assert set(differences(recipe, changed)) <= set(choice.settings)
    for first, second in itertools.pairwise(recipes):
        assert differences(first, second)


@pytest.mark.parametrize(
    ("name", "folder"), [("M = 16", "M_16"), ("no KL term", "no_KL_term"), ("../a/b", ".._a_b"), ("=", "")]
)
def test_folder_of_a_choice_has_only_safe_characters(name, folder):
    assert Choice(name=name, settings={}).folder == folder


def test_user_defined_ablation_is_read_from_a_file(tmp_path):
    (tmp_path / "depth.yaml").write_text(
        "question: Deeper?\n"
        "choices: [{name: a, settings: {autoencoder.num_encoder_layers: 4}, published: 4.7}]"
    )
    ablation = read_ablation(str(tmp_path / "depth.yaml"))
    assert ablation.question == "Deeper?"
    assert ablation.choices == [
        Choice(name="a", settings={"autoencoder.num_encoder_layers": 4}, published=4.7)
    ]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("[]", "its choices need names that differ"),
        ("[{name: a, settings: {}}, {name: a, settings: {}}]", "its choices need names that differ"),
        ("[{name: '=', settings: {}}]", "its choices need names that differ"),
        ("[{name: a, settings: {seed: 2}}]", "a choice cannot set 'seed', which all runs share; remove it"),
        (
            "[{name: a, settings: {data.context: 64}}]",
            "a choice cannot set 'data.context', which all runs share",
        ),
        (
            "[{name: a, settings: {autoencoder.path: x}}]",
            "a choice cannot set 'autoencoder.path', which all runs share",
        ),
    ],
)
def test_invalid_ablation_file_is_refused(choices, message, tmp_path):
    (tmp_path / "q.yaml").write_text(f"question: a\nchoices: {choices}\n")
    with pytest.raises(InputError, match=f"q.yaml': {message}"):
        read_ablation(str(tmp_path / "q.yaml"))


@pytest.mark.parametrize(
    ("recipe", "seeds", "only", "message"),
    [
        ("demo", [], [], "needs at least one seed, and choices from: alpha = 0.5, alpha = 0.75"),
        ("demo", [1], ["alpha = 3"], "needs at least one seed, and choices from: alpha = 0.5"),
        ("demo_baseline", [1], [], "needs a recipe for a CALM that trains its own autoencoder"),
    ],
)
def test_mistakes_are_refused_before_training(recipe, seeds, only, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run_ablation(read_ablation("alpha"), read_recipe(recipe), seeds, tmp_path / "out", only=only)
    assert not (tmp_path / "out").exists()


def test_seconds_are_summed_over_runs_if_all_are_known(tmp_path):
    for name, history in (
        ("a", {"autoencoder": [{"seconds": 2.0}]}),
        ("b", {"language_model": [{"seconds": 3.0}]}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "history.json").write_text(json.dumps(history))
    assert _seconds([tmp_path / "a", tmp_path / "b"]) == 5.0
    assert _seconds([tmp_path / "a", tmp_path / "nowhere"]) is None
    (tmp_path / "b/history.json").write_text("[")
    assert _seconds([tmp_path / "a", tmp_path / "b"]) is None


def test_a_choice_that_starts_from_a_model_trains_no_autoencoder(tmp_path):
    write_stories(tmp_path / "text.jsonl", 0, 20)
    recipe = toy_recipe(tmp_path / "text.jsonl")
    source = str(train(recipe, tmp_path / "source"))
    choices = {"new": {}, "begun": {"language_model.init_from": source}}
    ablation = Ablation(
        question="?", choices=[Choice(name=name, settings=settings) for name, settings in choices.items()]
    )
    table = run_ablation(ablation, recipe, [3], tmp_path / "out", num_blocks=4)
    new, begun = table.outcomes
    vocab_size = load_prepared(tmp_path / "out/data").vocab_size
    assert new.training_flops - begun.training_flops == autoencoder_flops(recipe, vocab_size) > 0
    assert new.excluded == () and begun.excluded == ("the model that it started from",)


@pytest.mark.parametrize("kind", ["new", "uptrained"])
def test_ablation_of_a_teacher(kind, tmp_path):
    """Models that have a likelihood are compared by cross-entropy as well."""
    source = str(toy_source(tmp_path))
    settings = {"language_model.init_from": source, "language_model.uptraining.last_layers": 2,
           "language_model.uptraining.first_layers": 0}  # fmt: skip
    if kind == "new":
        settings = {"autoencoder.kind": "codes", "autoencoder.latent_size": 32,
               "language_model.head": {"head_type": "sequential", "num_blocks": 1}}  # fmt: skip
    shared = {"language_model.training.steps": 2, "language_model.teacher.model": source}
    recipe = with_settings(toy_recipe(tmp_path / "text.jsonl", "adamw"), settings | shared)
    weights = {"text": 0.0, "both": 0.5}
    ablation = Ablation(
        question="Is a teacher worth its work?",
        choices=[Choice(name=name, settings={"language_model.teacher.weight": weight})
                 for name, weight in weights.items()],
    )  # fmt: skip
    table = run_ablation(ablation, recipe, [1], tmp_path / "out", num_blocks=4)
    alone, taught = table.outcomes
    assert taught.training_flops > alone.training_flops
    assert taught.scores[0]["cross_entropy"] != alone.scores[0]["cross_entropy"]
    write_ablation(table, tmp_path / "table.md")
    assert "| nats a token |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "out/both/seed1/teacher.json").is_file()
