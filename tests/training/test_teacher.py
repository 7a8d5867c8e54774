"""Training a language model that learns from a Transformer of tokens."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import launch
from safetensors.torch import load_file
from torch.testing import assert_close
from toy import failure, interrupt, killed_and_resumed, toy_recipe, toy_source
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from calm.cli import main
from calm.comparison.costs import language_model_flops, record_of
from calm.data.prepared import load_prepared
from calm.data.tokenizer import load_tokenizer
from calm.errors import InputError
from calm.facts import facts_of
from calm.flops import Work, cost_of, teaching_flops, training_flops
from calm.models.loading import load_language_model_and_tokenizer, load_model
from calm.report.facts import LANGUAGE_MODEL
from calm.sharing import write_card
from calm.training import opening, stages
from calm.training.overview import forecasts_of
from calm.training.recipe import TeacherSettings
from calm.training.recipe_files import read_recipe, with_settings, write_recipe
from calm.training.runs import Run
from calm.training.teacher import check_teacher, layer_of, read_teacher_facts, teacher_of

TEACHER, INIT = "language_model.teacher.model", "language_model.init_from"
CUT = {"language_model.uptraining.first_layers": 1, "language_model.uptraining.last_layers": 2}
SEQUENTIAL = {
    "autoencoder.kind": "codes",
    "autoencoder.latent_size": 32,
    "language_model.head": {"head_type": "sequential", "num_blocks": 1, "rank": 8, "token_size": 8},
}
AUTOREGRESSIVE = {"model": "autoregressive", "chunk_size": 1}
CLASSES = SEQUENTIAL | {"language_model.head": SEQUENTIAL["language_model.head"] | {"num_classes": 20}}
KINDS = {"uptrained": CUT, "new": SEQUENTIAL, "classes": CLASSES, "autoregressive": AUTOREGRESSIVE}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A text, and a Transformer of four layers with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    toy_source(folder)
    return folder


def recipe_for(base: Path, kind: str = "uptrained", **settings):
    """A recipe of a kind of student, with the Transformer as teacher; None stands for no teacher."""
    source = str(base / "source")
    own = {TEACHER: source, **({INIT: source} if kind == "uptrained" else {}), **KINDS[kind]}
    return with_settings(toy_recipe(base / "text.jsonl", "adamw"), {**own, **settings})


def losses_of(run: Path) -> list[float]:
    history = json.loads((run / "history.json").read_text())
    return [entry["loss"] for entry in history["language_model"] if "loss" in entry]


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


@pytest.fixture(scope="module")
def taught(base) -> Path:
    """The run of an uptrained CALM that learns from its own source."""
    stages.train(recipe_for(base, **{"language_model.teacher.states": 0.5}), base / "taught")
    return base / "taught"


def test_a_kill_does_not_matter(base, taught, tmp_path, monkeypatch):
    recipe = recipe_for(base, **{"language_model.teacher.states": 0.5})
    resumed = killed_and_resumed(recipe, tmp_path / "run", monkeypatch)
    assert (resumed / "model.safetensors").read_bytes() == (taught / "model/model.safetensors").read_bytes()
    inputs = json.loads((tmp_path / "run/inputs.json").read_text())
    assert f"the teacher '{base / 'source'}'" in inputs


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_changes_the_training_and_no_weight_does_not(kind, base, tmp_path, monkeypatch):
    log = {"language_model.training.log_every": 1}
    stages.train(recipe_for(base, kind, **log), tmp_path / "taught")
    alone = stages.train(
        recipe_for(base, kind, **log, **{TEACHER: None}, **tokens_of(base)), tmp_path / "alone"
    )
    assert losses_of(tmp_path / "taught") != losses_of(tmp_path / "alone")
    assert (tmp_path / "taught/teacher.json").is_file() and not (tmp_path / "alone/teacher.json").exists()
    # Nobody looks at a teacher who does not count.
    recipe = recipe_for(base, kind, **log, **{"language_model.teacher.weight": 0.0})
    monkeypatch.setattr("calm.training.teacher.load_language_model_and_tokenizer", None)
    without = stages.train(recipe, tmp_path / "without")
    assert (without / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert losses_of(tmp_path / "without") == losses_of(tmp_path / "alone")


def tokens_of(base: Path) -> dict[str, str]:
    return {"data.tokenizer": str(base / "source")}


def test_held_out_losses_are_of_the_text_alone(base, tmp_path):
    """With weights that do not move they are the same with a teacher and without."""
    still = {"language_model.training.optimizer.learning_rate": 0.0}
    figures = []
    for name, own in (("taught", {}), ("alone", {TEACHER: None})):
        stages.train(recipe_for(base, **still, **own), tmp_path / name)
        history = json.loads((tmp_path / name / "history.json").read_text())["language_model"]
        figures.append([entry["eval_cross_entropy"] for entry in history if "eval_cross_entropy" in entry])
    assert figures[0] == figures[1] and len(figures[0]) == 3
    assert losses_of(tmp_path / "taught") != losses_of(tmp_path / "alone")


def test_checkpointing_and_summed_gradients_change_nothing(base, tmp_path):
    more = {"language_model.training.batch_tokens": 128, "language_model.training.log_every": 1}
    ways = {
        "whole": {},
        "checkpointed": {"language_model.training.gradient_checkpointing": True},
        "summed": {"language_model.training.microbatch_tokens": 64},
    }
    for name, own in ways.items():
        stages.train(recipe_for(base, "new", **more, **own), tmp_path / name)
    whole = losses_of(tmp_path / "whole")
    for name in ("checkpointed", "summed"):
        assert_close(losses_of(tmp_path / name), whole, rtol=1e-5, atol=0)


def test_in_mixed_precision_the_teacher_is_in_half_precision(base, tmp_path):
    recipe = recipe_for(base, "new", **{"language_model.training.precision": "bf16"})
    stages.train(recipe, tmp_path / "run")
    data = load_prepared(tmp_path / "run/data")
    assert teacher_of(recipe, data).network.dtype == torch.bfloat16
    assert all(loss > 0 for loss in losses_of(tmp_path / "run"))


def test_two_processes_that_share_the_model(base, tmp_path):
    """Each has the teacher; the run is that of one."""
    settings = {
        "language_model.training.batch_tokens": 128,
        "language_model.training.log_every": 1,
        "language_model.teacher.states": 0.5,
    }
    recipe = recipe_for(base, **settings)
    stages.train(recipe, tmp_path / "one")
    write_recipe(with_settings(recipe, {"language_model.sharded": True}), tmp_path / "recipe.yaml")
    done = launch(2, "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=1e-5, atol=0)
    assert done.stderr.count("learning from '") == 1


def test_another_teacher_in_its_place_is_noticed(base, tmp_path, monkeypatch, capsys):
    moved = tmp_path / "teacher"
    shutil.copytree(base / "source", moved)
    recipe = recipe_for(base, "new", **{TEACHER: str(moved)})
    with monkeypatch.context() as patch:
        interrupt(patch, "language_model", 5)
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe, tmp_path / "run")
    network = LlamaForCausalLM.from_pretrained(moved)
    network.model.norm.weight.data[0] += 1
    network.save_pretrained(moved)
    said = failure(capsys, "train", "--resume", "--output", tmp_path / "run")
    assert f"the teacher '{moved}' changed since the run began" in said


def test_a_new_model_takes_the_tokens_of_its_teacher_whose_embedding_may_be_larger(base, tmp_path):
    source = toy_source(tmp_path, vocab_size=320)
    model = load_model(str(stages.train(recipe_for(base, "new", **{TEACHER: str(source)}), tmp_path / "run")))
    assert model.config.vocab_size == 300
    assert (tmp_path / "run/data/tokenizer/tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()


def test_what_is_known_of_a_run_names_the_teacher(base, taught):
    facts, recipe = read_teacher_facts(taught), read_recipe(str(taught / "recipe.yaml"))
    network, _ = load_language_model_and_tokenizer(str(base / "source"))
    assert facts.model == str(base / "source")
    assert facts.parameters == sum(one.numel() for one in network.parameters())
    assert facts.flops_per_token == sum(cost_of(network.config, Work(32)).inference.values())
    model = load_model(str(taught / "model"))
    tokens, own = 8 * 64, training_flops(model.config, 32)
    wanted = tokens * (own + facts.flops_per_token)
    history = json.loads((taught / "history.json").read_text())
    known = facts_of(recipe, model, history, facts)
    assert known.flops == pytest.approx(wanted) and "source" in known.teacher
    assert [stage.name for stage in known.stages] == [LANGUAGE_MODEL]
    assert record_of(taught, model.config).flops == pytest.approx(wanted)
    assert language_model_flops(recipe, 300) == pytest.approx(wanted)
    (forecast,) = forecasts_of(Run(recipe, taught.parent / "next"), load_prepared(taught / "data"))
    assert forecast.flops == pytest.approx(wanted) and "learning from '" in str(forecast)
    card = write_card(taught, num_blocks=4).read_text()
    assert "It learned from the teacher 'source' (" in card and str(base) not in card


def test_the_flops_of_a_recipe_have_a_part_for_the_teacher(base, tmp_path, capsys):
    write_recipe(recipe_for(base), tmp_path / "recipe.yaml")
    main(["flops", str(tmp_path / "recipe.yaml"), "--positions", "8", "--json"])
    told = json.loads(capsys.readouterr().out)
    config = AutoConfig.from_pretrained(base / "source")
    assert told["training"]["teacher"] == teaching_flops(config, 32)


def test_the_flops_of_a_recipe_are_those_of_the_tokens_that_it_is_trained_with(base, tmp_path, capsys):
    """The teacher's, where it names no others."""
    write_recipe(recipe_for(base, "new", **{"data.vocab_size": 999}), tmp_path / "recipe.yaml")
    main(["flops", str(tmp_path / "recipe.yaml"), "--json"])
    size = len(load_tokenizer(str(base / "source")))
    assert json.loads(capsys.readouterr().out)["vocab_size"] == size != 999


def test_flops_of_a_teacher_of_another_kind_are_counted():
    """By torch; for a Llama that comes to what our own count says, but for the angles of positions."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    mistral = MistralConfig(**sizes, sliding_window=None)
    llama = AutoConfig.for_model("llama", **sizes)
    assert teaching_flops(mistral, 64) == pytest.approx(teaching_flops(llama, 64), rel=2e-3)


REFUSED = {
    "nothing there": ("new", {TEACHER: "nowhere"}, "nowhere"),
    "settings alone": (
        "new",
        {TEACHER: None, "language_model.teacher.weight": 0.5},
        "has settings but no model",
    ),
    "other tokens": (
        "new",
        {"data.vocab_size": 290, "data.tokenizer": "other"},
        "has a different vocabulary from the text",
    ),
    "another loss": (
        "new",
        {"language_model.head": {"head_type": "parallel", "loss": "brier"}},
        "set language_model.head.loss to cross_entropy",
    ),
    "states of another": ("new", {"language_model.teacher.states": 1.0}, "set language_model.init_from to"),
    "a head of latents": (
        "new",
        {"language_model.head": {"head_type": "energy"}},
        "head of type 'energy' cannot learn from a teacher",
    ),
    "a CALM": ("new", {TEACHER: "stories"}, "a teacher must be a token-level Transformer, but 'stories' is"),
    "long blocks": (
        "new",
        {"data.context": 256, "language_model.training.batch_tokens": 256},
        "has a context length of 128 tokens, less than data.context, which is 256",
    ),
    "no temperature": ("new", {"language_model.teacher.temperature": 0.0}, "teacher.temperature must be"),
    "too much weight": ("new", {"language_model.teacher.weight": 1.5}, "teacher.weight must be"),
}


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    kind, changes, message, base, tmp_path, capsys, monkeypatch
):
    if changes.get("data.tokenizer") == "other":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base / "source")
        tokenizer.add_tokens("another")
        tokenizer.save_pretrained(tmp_path / "other")
        changes = {**changes, "data.tokenizer": str(tmp_path / "other")}
    write_recipe(recipe_for(base, kind, **changes), tmp_path / "recipe.yaml")
    monkeypatch.setattr(opening, "prepare", lambda *_, **__: pytest.fail("text was prepared"))
    said = failure(capsys, "train", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert message in said and not (tmp_path / "run").exists()


SIZES = {"vocab_size": 300, "hidden_size": 16, "num_attention_heads": 2, "bos_token_id": 2, "eos_token_id": 1,
         "pad_token_id": 0}  # fmt: skip
STRANGE = {
    "scaled scores": (CohereConfig(**SIZES, intermediate_size=24, num_hidden_layers=1, logit_scale=0.5),
                      "not simply its states times its output embeddings"),
    "a state that runs on": (MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1),
                             "does not keep the documents of a block apart"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "message"), STRANGE.values(), ids=STRANGE)
def test_a_teacher_that_cannot_be_read_so_is_refused(config, message, base, taught, tmp_path):
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    for weight in network.parameters():
        weight.data = torch.randn_like(weight)
    network.save_pretrained(tmp_path / "odd")
    for file in (base / "source").glob("tokenizer*"):
        (tmp_path / "odd" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=message):
        teacher_of(
            recipe_for(base, "new", **{TEACHER: str(tmp_path / "odd")}), load_prepared(taught / "data")
        )


def test_a_transformer_of_another_kind_cannot_be_taught(base):
    network = AutoModelForCausalLM.from_config(
        MistralConfig(**SIZES, intermediate_size=24, num_hidden_layers=1)
    )
    with pytest.raises(InputError, match="a model of type 'mistral' cannot learn from a teacher"):
        check_teacher(recipe_for(base, "autoregressive"), network)


def test_settings_say_whether_a_teacher_takes_part():
    assert not TeacherSettings().is_used and not TeacherSettings(model="x", weight=0.0).is_used
    assert TeacherSettings(model="x").is_used
    assert TeacherSettings(model="x", weight=0.0, states=0.1).is_used


@pytest.mark.parametrize(("layers", "wanted"), [(None, 1), ([0, 2, 3], 0), ([1, 2, 3], 1), ([0, 1, 2, 3], 1)])
def test_states_are_those_of_the_layer_with_which_the_backbone_ends(layers, wanted, base):
    own = {"language_model.uptraining.layers": layers, "language_model.teacher.states": 1.0}
    config = AutoConfig.from_pretrained(base / "source")
    assert layer_of(recipe_for(base, **own), config) == wanted
    assert layer_of(recipe_for(base), config) is None


def test_the_folder_of_a_teacher_is_never_replaced(base, tmp_path):
    places = opening._input_paths(recipe_for(base, "new"))
    assert str(base / "source") in places
