"""Training a language model that learns from a token-level Transformer."""

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
    """A recipe of one of KINDS, with the Transformer as teacher; setting TEACHER to None removes it."""
    source = str(base / "source")
    defaults = {TEACHER: source, **({INIT: source} if kind == "uptrained" else {}), **KINDS[kind]}
    return with_settings(toy_recipe(base / "text.jsonl", "adamw"), {**defaults, **settings})


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


def test_killed_run_resumes_to_the_same_weights(base, taught, tmp_path, monkeypatch):
    recipe = recipe_for(base, **{"language_model.teacher.states": 0.5})
    resumed = killed_and_resumed(recipe, tmp_path / "run", monkeypatch)
    assert (resumed / "model.safetensors").read_bytes() == (taught / "model/model.safetensors").read_bytes()
    inputs = json.loads((tmp_path / "run/inputs.json").read_text())
    assert f"the teacher '{base / 'source'}'" in inputs


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_changes_the_training_unless_its_weight_is_zero(kind, base, tmp_path, monkeypatch):
    log = {"language_model.training.log_every": 1}
    stages.train(recipe_for(base, kind, **log), tmp_path / "taught")
    alone = stages.train(
        recipe_for(base, kind, **log, **{TEACHER: None}, **tokens_of(base)), tmp_path / "alone"
    )
    assert losses_of(tmp_path / "taught") != losses_of(tmp_path / "alone")
    assert (tmp_path / "taught/teacher.json").is_file() and not (tmp_path / "alone/teacher.json").exists()
    # A teacher whose weight is 0 is not even loaded.
    recipe = recipe_for(base, kind, **log, **{"language_model.teacher.weight": 0.0})
    monkeypatch.setattr("calm.training.teacher.load_language_model_and_tokenizer", None)
    without = stages.train(recipe, tmp_path / "without")
    assert (without / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert losses_of(tmp_path / "without") == losses_of(tmp_path / "alone")


def tokens_of(base: Path) -> dict[str, str]:
    return {"data.tokenizer": str(base / "source")}


def test_held_out_losses_do_not_include_the_teacher(base, tmp_path):
    """With a learning rate of zero, they are the same with a teacher and without."""
    zero_rate = {"language_model.training.optimizer.learning_rate": 0.0}
    figures = []
    for name, changes in (("taught", {}), ("alone", {TEACHER: None})):
        stages.train(recipe_for(base, **zero_rate, **changes), tmp_path / name)
        history = json.loads((tmp_path / name / "history.json").read_text())["language_model"]
        figures.append([entry["eval_cross_entropy"] for entry in history if "eval_cross_entropy" in entry])
    assert figures[0] == figures[1] and len(figures[0]) == 3
    assert losses_of(tmp_path / "taught") != losses_of(tmp_path / "alone")


def test_gradient_checkpointing_and_accumulation_change_nothing(base, tmp_path):
    settings = {"language_model.training.batch_tokens": 128, "language_model.training.log_every": 1}
    variants = {
        "plain": {},
        "checkpointed": {"language_model.training.gradient_checkpointing": True},
        "summed": {"language_model.training.microbatch_tokens": 64},
    }
    for name, changes in variants.items():
        stages.train(recipe_for(base, "new", **settings, **changes), tmp_path / name)
    expected = losses_of(tmp_path / "plain")
    for name in ("checkpointed", "summed"):
        assert_close(losses_of(tmp_path / name), expected, rtol=1e-5, atol=0)


def test_in_mixed_precision_the_teacher_is_in_half_precision(base, tmp_path):
    recipe = recipe_for(base, "new", **{"language_model.training.precision": "bf16"})
    stages.train(recipe, tmp_path / "run")
    data = load_prepared(tmp_path / "run/data")
    assert teacher_of(recipe, data).network.dtype == torch.bfloat16
    assert all(loss > 0 for loss in losses_of(tmp_path / "run"))


def test_sharding_between_two_processes_has_the_losses_of_one(base, tmp_path):
    """Each process has the whole teacher."""
    settings = {
        "language_model.training.batch_tokens": 128,
        "language_model.training.log_every": 1,
        "language_model.teacher.states": 0.5,
    }
    recipe = recipe_for(base, **settings)
    stages.train(recipe, tmp_path / "one")
    write_recipe(with_settings(recipe, {"language_model.sharded": True}), tmp_path / "recipe.yaml")
    result = launch(2, "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "two")
    assert result.returncode == 0, result.stderr[-3000:]
    assert_close(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=1e-5, atol=0)
    assert result.stderr.count("learning from '") == 1


def test_resuming_is_refused_after_the_teacher_changed(base, tmp_path, monkeypatch, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(base / "source", teacher)
    recipe = recipe_for(base, "new", **{TEACHER: str(teacher)})
    with monkeypatch.context() as patch:
        interrupt(patch, "language_model", 5)
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe, tmp_path / "run")
    network = LlamaForCausalLM.from_pretrained(teacher)
    network.model.norm.weight.data[0] += 1
    network.save_pretrained(teacher)
    error = failure(capsys, "train", "--resume", "--output", tmp_path / "run")
    assert f"the teacher '{teacher}' changed since the run began" in error


def test_new_model_takes_the_tokenizer_of_its_teacher(base, tmp_path):
    """Also if the teacher's embedding has more rows than the tokenizer has tokens."""
    source = toy_source(tmp_path, vocab_size=320)
    model = load_model(str(stages.train(recipe_for(base, "new", **{TEACHER: str(source)}), tmp_path / "run")))
    assert model.config.vocab_size == 300
    assert (tmp_path / "run/data/tokenizer/tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()


def test_facts_costs_and_card_of_a_run_include_the_teacher(base, taught):
    facts, recipe = read_teacher_facts(taught), read_recipe(str(taught / "recipe.yaml"))
    network, _ = load_language_model_and_tokenizer(str(base / "source"))
    assert facts.model == str(base / "source")
    assert facts.parameters == sum(weight.numel() for weight in network.parameters())
    assert facts.flops_per_token == sum(cost_of(network.config, Work(32)).inference.values())
    model = load_model(str(taught / "model"))
    tokens, flops_per_token = 8 * 64, training_flops(model.config, 32)
    expected = tokens * (flops_per_token + facts.flops_per_token)
    history = json.loads((taught / "history.json").read_text())
    known = facts_of(recipe, model, history, facts)
    assert known.flops == pytest.approx(expected) and "source" in known.teacher
    assert [stage.name for stage in known.stages] == [LANGUAGE_MODEL]
    assert record_of(taught, model.config).flops == pytest.approx(expected)
    assert language_model_flops(recipe, 300) == pytest.approx(expected)
    (forecast,) = forecasts_of(Run(recipe, taught.parent / "next"), load_prepared(taught / "data"))
    assert forecast.flops == pytest.approx(expected) and "learning from '" in str(forecast)
    card = write_card(taught, num_blocks=4).read_text()
    assert "It learned from the teacher 'source' (" in card and str(base) not in card


def test_flops_command_lists_those_of_the_teacher(base, tmp_path, capsys):
    write_recipe(recipe_for(base), tmp_path / "recipe.yaml")
    main(["flops", str(tmp_path / "recipe.yaml"), "--positions", "8", "--json"])
    flops = json.loads(capsys.readouterr().out)
    config = AutoConfig.from_pretrained(base / "source")
    assert flops["training"]["teacher"] == teaching_flops(config, 32)


def test_flops_command_uses_the_vocabulary_of_the_teacher(base, tmp_path, capsys):
    """As training does if the recipe names no tokenizer."""
    write_recipe(recipe_for(base, "new", **{"data.vocab_size": 999}), tmp_path / "recipe.yaml")
    main(["flops", str(tmp_path / "recipe.yaml"), "--json"])
    size = len(load_tokenizer(str(base / "source")))
    assert json.loads(capsys.readouterr().out)["vocab_size"] == size != 999


def test_flops_of_a_teacher_of_another_architecture_are_counted():
    """By torch: for a Mistral, what our formula gives for the same Llama, but for the rotary angles."""
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
def test_invalid_settings_are_refused_before_anything_is_written(
    kind, changes, message, base, tmp_path, capsys, monkeypatch
):
    if changes.get("data.tokenizer") == "other":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base / "source")
        tokenizer.add_tokens("another")
        tokenizer.save_pretrained(tmp_path / "other")
        changes = {**changes, "data.tokenizer": str(tmp_path / "other")}
    write_recipe(recipe_for(base, kind, **changes), tmp_path / "recipe.yaml")
    monkeypatch.setattr(opening, "prepare", lambda *_, **__: pytest.fail("text was prepared"))
    error = failure(capsys, "train", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert message in error and not (tmp_path / "run").exists()


SIZES = {"vocab_size": 300, "hidden_size": 16, "num_attention_heads": 2, "bos_token_id": 2, "eos_token_id": 1,
         "pad_token_id": 0}  # fmt: skip
UNSUPPORTED = {
    "scaled logits": (CohereConfig(**SIZES, intermediate_size=24, num_hidden_layers=1, logit_scale=0.5),
                      "not simply its states times its output embeddings"),
    "a state that runs on": (MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1),
                             "does not keep the documents of a block apart"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_teacher_of_an_unsupported_architecture_is_refused(config, message, base, taught, tmp_path):
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


def test_student_of_an_unsupported_architecture_is_refused(base):
    network = AutoModelForCausalLM.from_config(
        MistralConfig(**SIZES, intermediate_size=24, num_hidden_layers=1)
    )
    with pytest.raises(InputError, match="a model of type 'mistral' cannot learn from a teacher"):
        check_teacher(recipe_for(base, "autoregressive"), network)


def test_teacher_is_used_only_if_it_is_named_and_has_a_weight():
    assert not TeacherSettings().is_used and not TeacherSettings(model="x", weight=0.0).is_used
    assert TeacherSettings(model="x").is_used
    assert TeacherSettings(model="x", weight=0.0, states=0.1).is_used


@pytest.mark.parametrize(
    ("layers", "expected"), [(None, 1), ([0, 2, 3], 0), ([1, 2, 3], 1), ([0, 1, 2, 3], 1)]
)
def test_states_are_learned_from_the_last_layer_of_the_backbone(layers, expected, base):
    settings = {"language_model.uptraining.layers": layers, "language_model.teacher.states": 1.0}
    config = AutoConfig.from_pretrained(base / "source")
    assert layer_of(recipe_for(base, **settings), config) == expected
    assert layer_of(recipe_for(base), config) is None


def test_folder_of_a_teacher_is_an_input_of_the_run(base, tmp_path):
    """So no run with this teacher may overwrite it."""
    paths = opening._input_paths(recipe_for(base, "new"))
    assert str(base / "source") in paths
