"""A recipe that extends another says only what differs."""

import dataclasses
import json
import operator

import pytest
import yaml

from calm.cli import main
from calm.errors import InputError
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.recipe import Recipe
from calm.training.recipe_files import differences, read_recipe, read_recipe_of, with_settings, write_recipe
from calm.training.recipe_settings import kind_of_recipe, override_settings, shipped_recipes

# What users might write who have text of their own, and more time than `laptop_quick` takes.
USER_RECIPE = """
# Letters of my grandmother.
extends: laptop_quick
data:
  sources: letters.txt
  separator: ""
language_model:
  num_layers: 6
  head: {rank: 48}
  training: {steps: 9000}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipes(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def test_user_recipe_says_only_what_differs(folder):
    write_recipes(folder, mine=USER_RECIPE)
    mine, quick = read_recipe("mine.yaml"), read_recipe("laptop_quick")
    assert differences(mine, quick) == [
        "data.separator",
        "data.sources",
        "language_model.head.rank",
        "language_model.num_layers",
        "language_model.training.steps",
    ]
    assert mine.language_model.head == {"head_type": "sequential", "num_blocks": 2, "rank": 48}


def test_extended_path_is_relative_to_the_file_that_names_it(folder):
    for name in ("bases/small", "mine"):
        (folder / name).mkdir(parents=True)
    (folder / "bases/small/base.yaml").write_text("extends: ../seed.yaml\nchunk_size: 2\n")
    (folder / "bases/seed.yaml").write_text("seed: 5\n")
    (folder / "mine/mine.yaml").write_text("extends: ../bases/small/base.yaml\ndata: {context: 64}\n")
    assert read_recipe("mine/mine.yaml") == dataclasses.replace(
        Recipe(), seed=5, chunk_size=2, data=dataclasses.replace(Recipe().data, context=64)
    )
    (folder / "absolute.yaml").write_text(f"extends: {folder / 'bases/seed.yaml'}\n")
    assert read_recipe("absolute.yaml").seed == 5


def test_shipped_name_takes_precedence_over_a_file_of_that_name(folder):
    (folder / "demo").write_text("extends: demo\nseed: 9\n")
    assert read_recipe("demo") == dataclasses.replace(read_recipe(str(shipped_recipes()["demo"])), seed=9)


def test_written_recipe_is_resolved_and_extends_nothing(folder):
    write_recipes(folder, mine=USER_RECIPE)
    write_recipe(read_recipe("mine.yaml"), folder / "recipe.yaml")
    written = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert written == dataclasses.asdict(read_recipe("mine.yaml"))
    write_recipes(folder, again="extends: recipe.yaml\nseed: 2\n")
    assert differences(read_recipe("again.yaml"), read_recipe("mine.yaml")) == ["seed"]


def test_options_of_the_command_line_take_precedence(folder, capsys):
    write_recipes(folder, mine=USER_RECIPE)
    with pytest.raises(SystemExit):
        main(["train", "--recipe", "mine.yaml", "--seed", "7", "--language_model.num_layers=3",
              "--language_model.head.rank", "5", "--print_config"])  # fmt: skip
    printed = yaml.safe_load(capsys.readouterr().out)
    model = printed["language_model"]
    assert (printed["seed"], model["num_layers"], model["training"]["steps"]) == (7, 3, 9000)
    assert model["head"] == {"head_type": "sequential", "num_blocks": 2, "rank": 5}
    assert printed["data"]["vocab_size"] == 4096  # That of `laptop`, which `laptop_quick` extends.


def test_fine_tuning_recipes_can_extend_others(folder):
    write_recipes(folder, mine="extends: lora\nlora: {rank: 8}\n")
    mine = read_recipe_of(FinetuningRecipe, "mine.yaml")
    assert differences(mine, read_recipe_of(FinetuningRecipe, "lora")) == ["lora.rank"]


CALM = {"autoencoder": {"latent_size": 9}, "language_model": {"head": {"head_type": "flow", "num_blocks": 3}}}


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        ({"seed": 1, "chunk_size": 2}, {"seed": 3}, {"seed": 3, "chunk_size": 2}),
        # A list is a single setting.
        ({"data": {"sources": ["a", "b"]}}, {"data": {"sources": ["c"]}}, {"data": {"sources": ["c"]}}),
        ({"data": {"tokenizer": "t"}}, {"data": {"tokenizer": None}}, {"data": {"tokenizer": None}}),
        # The fields of one head are not those of another.
        (
            CALM,
            {"language_model": {"head": {"num_blocks": 1}}},
            CALM | {"language_model": {"head": {"head_type": "flow", "num_blocks": 1}}},
        ),
        (
            CALM,
            {"language_model": {"head": {"head_type": "energy"}}},
            CALM | {"language_model": {"head": {"head_type": "energy"}}},
        ),
        # The same holds for kinds that the base leaves at their defaults.
        (
            {"language_model": {"head": {"alpha": 0.5}, "num_layers": 2}},
            {"language_model": {"head": {"head_type": "energy", "num_blocks": 2}}},
            {
                "language_model": {
                    "head": {"head_type": "energy", "num_blocks": 2, "alpha": 0.5},
                    "num_layers": 2,
                }
            },
        ),
        (
            {"language_model": {"head": {"alpha": 0.5}, "num_layers": 2}},
            {"language_model": {"head": {"head_type": "flow"}}},
            {"language_model": {"head": {"head_type": "flow"}, "num_layers": 2}},
        ),
        (CALM, {"autoencoder": {"kind": "codes"}}, CALM | {"autoencoder": {"kind": "codes"}}),
        (
            CALM,
            {"autoencoder": {"kind": "mlp", "hidden_size": 4}},
            CALM | {"autoencoder": {"latent_size": 9, "kind": "mlp", "hidden_size": 4}},
        ),
        # A model without chunks has neither autoencoder nor head.
        (
            CALM | {"seed": 4},
            {"model": "autoregressive", "chunk_size": 1},
            {"model": "autoregressive", "chunk_size": 1, "seed": 4, "language_model": {}},
        ),
    ],
)
def test_settings_are_merged_but_not_across_kinds(base, changes, expected):
    before = json.dumps(base)
    assert override_settings(base, changes, Recipe) == expected
    assert json.dumps(base) == before


HEAD, OPTIMIZER = "language_model.head", "language_model.training.optimizer"
OVERRIDDEN = """
autoencoder: {kind: codes, latent_size: 40, hidden_size: 24}
language_model:
  head: {head_type: sequential, rank: 48}
  training: {optimizer: {name: lion, extra: {use_gc: true}}}
"""
OVERRIDES = {
    "another head": (
        {f"{HEAD}.num_blocks": 3, f"{HEAD}.head_type": "flow"},
        {HEAD: {"num_blocks": 3, "head_type": "flow"}},
    ),
    "the same head": (
        {f"{HEAD}.head_type": "sequential", f"{HEAD}.num_blocks": 3},
        {HEAD: {"head_type": "sequential", "rank": 48, "num_blocks": 3}},
    ),
    "another autoencoder": (
        {"autoencoder.latent_size": 64, "autoencoder.kind": "mlp"},
        {"autoencoder.latent_size": 64, "autoencoder.hidden_size": Recipe().autoencoder.hidden_size},
    ),
    "another model": (
        {"model": "autoregressive", "chunk_size": 1},
        {"autoencoder.latent_size": Recipe().autoencoder.latent_size, HEAD: Recipe().language_model.head},
    ),
    "another optimizer": (
        {f"{OPTIMIZER}.name": "adamw"},
        {f"{OPTIMIZER}.extra": {}, HEAD: {"head_type": "sequential", "rank": 48}},
    ),
}


@pytest.mark.parametrize(("settings", "expected"), OVERRIDES.values(), ids=OVERRIDES)
def test_files_python_and_options_override_by_the_same_rule(settings, expected, tmp_path, capsys):
    (tmp_path / "base.yaml").write_text(OVERRIDDEN)
    (tmp_path / "own.yaml").write_text(json.dumps({"extends": "base.yaml", **settings}))
    by_file = read_recipe(str(tmp_path / "own.yaml"))
    for name, value in expected.items():
        assert operator.attrgetter(name)(by_file) == value
    assert with_settings(read_recipe(str(tmp_path / "base.yaml")), settings) == by_file
    options = [f"--{name}={value}" for name, value in settings.items()]
    with pytest.raises(SystemExit):
        main(["train", "--recipe", str(tmp_path / "base.yaml"), *options, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert {name: printed[name] for name in dataclasses.asdict(by_file)} == dataclasses.asdict(by_file)


def test_extra_arguments_are_dropped_with_their_optimizer():
    optimizer = {"name": "lion", "learning_rate": 0.1, "extra": {"use_gc": True}}
    base = {"training": {"optimizer": optimizer}}

    def overridden(**changes):
        settings = override_settings(base, {"training": {"optimizer": changes}}, FinetuningRecipe)
        return settings["training"]["optimizer"]

    assert overridden(extra={"cautious": True})["extra"] == {"use_gc": True, "cautious": True}
    assert overridden(name="lion") == optimizer
    assert overridden(name="adan") == {"name": "adan", "learning_rate": 0.1}
    assert overridden(name="adan", extra={"a": 1}) == {
        "name": "adan",
        "learning_rate": 0.1,
        "extra": {"a": 1},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: demmo", "recipe 'r.yaml' extends 'demmo', but there is no file 'demmo' and no shipped "
                           r"recipe of that name; did you mean 'demo'\?"),
        ("extends: other/x.yaml", "no file 'other/x.yaml' .* shipped recipes are calm_l, calm_m, "),
        ("extends: run", r"did you mean 'run/recipe.yaml'\?"),
        ("extends: lora", "recipe 'r.yaml' extends 'lora', which is a recipe for calm finetune, not for"),
        ("extends: tuned.yaml", "^'tuned.yaml' is a recipe for calm finetune, not for calm train."),
        ("extends: [demo]", r"recipe 'r.yaml': extends must be the name .* or a path, got '\['demo'\]'"),
        ("extends: 3", "extends must be the name of a shipped recipe or a path, got '3'"),
        ("extends:", "extends must be the name of a shipped recipe or a path, got null"),
        ("extends: ''", "extends must be the name of a shipped recipe or a path, got ''"),
        ("extends: r.yaml", r"recipe 'r.yaml' extends itself \(r.yaml -> r.yaml\); remove one 'extends'"),
        ("extends: circle.yaml", r"extends itself \(r.yaml -> circle.yaml -> r.yaml\)"),
        ("extends: typo.yaml\nseed: 1", "^recipe 'typo.yaml': there is no setting 'data.contxt'; did you"),
        ("extends: above.yaml", "^recipe 'typo.yaml': there is no setting 'data.contxt'"),
        ("extends: type.yaml\nseed: 1", "^recipe 'type.yaml': seed must be a whole number, got 'one'."),
        ("extends: type.yaml\nseed: two", "^recipe 'r.yaml': seed must be a whole number, got 'two'."),
        ("extends: broken.yaml", r"^the recipe 'broken.yaml' is not valid YAML \(line 1"),
        ("extends: empty.yaml", "^the recipe 'empty.yaml' contains no settings"),
        ("data: {extends: demo}", "there is no setting 'data.extends'"),
        ('extends: "a\\0b"', "extends 'a\0b', but there is no file"),
        ("extends: " + "x" * 300, "recipe 'r.yaml' extends 'x"),
    ],
    ids=range(20),
)  # fmt: skip
def test_a_mistake_is_one_sentence_that_names_the_file(text, message, folder):
    write_recipes(
        folder, r=text, circle="extends: r.yaml", typo="data: {contxt: 1}", above="extends: typo.yaml",
        type="seed: one", broken="seed: 'a", empty="", tuned="lora: {rank: 2}",
    )  # fmt: skip
    (folder / "run").mkdir()
    (folder / "run/recipe.yaml").write_text("seed: 1\n")
    with pytest.raises(InputError, match=message) as caught:
        read_recipe("r.yaml")
    assert "\n" not in str(caught.value) and "Parser key" not in str(caught.value)


def test_dotted_names_set_fields_of_groups(folder):
    write_recipes(
        folder,
        base="data: {context: 64}\nlanguage_model: {training.steps: 7}\n",
        mine="extends: base.yaml\ndata.vocab_size: 300\nlanguage_model.head.rank: 2\n",
    )
    mine = read_recipe("mine.yaml")
    assert (mine.data.context, mine.data.vocab_size) == (64, 300)
    assert (mine.language_model.training.steps, mine.language_model.head) == (7, {"rank": 2})


@pytest.mark.parametrize("kind", [Recipe, FinetuningRecipe])
def test_recipe_has_the_kind_of_its_base(folder, kind):
    for name in shipped_recipes(kind):
        write_recipes(folder, one=f"extends: {name}", two="extends: one.yaml\nseed: 3")
        assert kind_of_recipe(name) is kind_of_recipe("two.yaml") is kind


def test_kind_of_a_recipe_without_a_base_follows_from_its_settings(folder):
    write_recipes(
        folder, own="lora: {rank: 2}", bare="seed: 3", ring="extends: ring.yaml", lost="extends: nowhere"
    )
    assert kind_of_recipe("own.yaml") is FinetuningRecipe
    for name in ("bare.yaml", "ring.yaml", "lost.yaml"):
        assert kind_of_recipe(name) is Recipe
    with pytest.raises(InputError, match="there is no recipe 'none'"):
        kind_of_recipe("none")
