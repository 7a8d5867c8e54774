"""Fine-tuning: models learn the examples, adapters are saved, merged and loaded, killed runs resume."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch
from processes import launch
from safetensors.torch import load_file
from tiny import HEADS, tiny_model
from torch.testing import assert_close
from toy import failure, toy_recipe
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from calm.cli import main
from calm.data.stories import stories, write_stories
from calm.data.tokenizer import train_tokenizer
from calm.errors import InputError
from calm.models.loading import config_of, load_language_model_and_tokenizer
from calm.texts import continue_texts
from calm.training import stages
from calm.training.adapters import with_adapters
from calm.training.finetuning import finetune
from calm.training.finetuning_recipe import (
    AnswerSettings,
    ExampleSettings,
    FinetuningRecipe,
    LoraSettings,
)
from calm.training.recipe import OptimizerSettings, TrainingSettings
from calm.training.recipe_files import read_recipe_of, with_settings, write_recipe
from calm.training.recipe_settings import shipped_recipes
from calm.training.trainer import ChunkTrainer

ANSWERS = {"cat": "meow", "dog": "woof", "duck": "quack"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trained CALM and a baseline, with the same tokenizer, and examples that both can learn."""
    folder = tmp_path_factory.mktemp("base")
    write_stories(folder / "text.jsonl", 0, 100)
    recipe = with_settings(
        toy_recipe(folder / "text.jsonl", "adamw"),
        {
            "autoencoder.training.steps": 600,
            "autoencoder.training.batch_tokens": 512,
            "autoencoder.training.evaluate_every": 600,
            "autoencoder.training.save_every": 600,
            "autoencoder.training.optimizer.learning_rate": 1e-2,
            "autoencoder.hidden_size": 48,
            "autoencoder.latent_size": 16,
            "autoencoder.token_dropout": 0.0,
            "autoencoder.latent_dropout": 0.0,
            "language_model.head.noise_size": 8,
            "language_model.head.num_posterior_draws": 0,
            "language_model.hidden_size": 48,
        },
    )
    stages.train(recipe, folder / "calm")
    plain = with_settings(recipe, {"model": "autoregressive", "chunk_size": 1})
    stages.train(plain, folder / "plain")
    records = [
        {"prompt": f"{n} The {animal} says", "completion": f" {sound}"}
        for n in range(40)
        for animal, sound in ANSWERS.items()
    ]
    (folder / "examples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def recipe_for(base, model="calm", *, rank=0, steps=8, **training):
    return FinetuningRecipe(
        seed=2,
        model=str(base / model / "model"),
        examples=ExampleSettings(sources=str(base / "examples.jsonl"), context=32),
        lora=LoraSettings(rank=rank, alpha=8, layers="both" if model == "calm" else "backbone"),
        answers=AnswerSettings(number=8, num_draws=8),
        training=TrainingSettings(
            **{
                "steps": steps,
                "batch_tokens": 128,
                "evaluate_every": 4,
                "save_every": 4,
                "log_every": 1,
                "optimizer": OptimizerSettings(
                    name="adamw", learning_rate=1e-2, warmup_steps=2, schedule="linear"
                ),
            }
            | training
        ),
    )


def answers_of(run):
    return [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("model", ["calm", "plain"])
def test_model_learns_to_answer(model, base, tmp_path):
    recipe = recipe_for(base, model, steps=600, evaluate_every=600, save_every=600, batch_tokens=512)
    finetune(recipe, tmp_path / "run")
    answers = answers_of(tmp_path / "run")
    assert len(answers) == 8 and answers[0].keys() == {"prompt", "completion", "before", "after"}
    correct = {
        when: sum(answer[when].strip() == answer["completion"].strip() for answer in answers)
        for when in ("before", "after")
    }
    assert correct["before"] <= 2 and correct["after"] >= 6, answers
    history = json.loads((tmp_path / "run/history.json").read_text())
    last = [entry for entry in history if "eval_exact_match" in entry][-1]
    assert last["eval_exact_match"] == 100 * correct["after"] / 8

    tuned, tokenizer = load_language_model_and_tokenizer(str(tmp_path / "run/model"))
    [text] = continue_texts(tuned, tokenizer, [answers[0]["prompt"]], temperature=0, num_draws=8, seed=0)
    assert text.strip() == answers[0]["after"].strip()  # And generation ends there.


def test_number_of_answers_may_be_zero_but_not_negative(base, tmp_path):
    recipe = recipe_for(base)
    finetune(dataclasses.replace(recipe, answers=AnswerSettings(number=0)), tmp_path / "run")
    assert (tmp_path / "run/model/config.json").is_file() and answers_of(tmp_path / "run") == []
    with pytest.raises(InputError, match=r"answers\.number must be at least 0 and .*, got -1"):
        finetune(dataclasses.replace(recipe, answers=AnswerSettings(number=-1)), tmp_path / "other")


def test_adapters_find_their_base_model_from_another_directory(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base)
    recipe = dataclasses.replace(recipe_for(base, rank=2), model="calm/model")
    finetune(recipe, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    load_language_model_and_tokenizer("run/adapter")


def test_autoencoder_is_not_trained(base, tmp_path):
    finetune(recipe_for(base), tmp_path / "run")
    before, after = weights_of(base / "calm/model"), weights_of(tmp_path / "run/model")
    assert before.keys() == after.keys()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"backbone", "head", "projection"}


@pytest.mark.parametrize("model", ["calm", "plain"])
def test_adapters_are_saved_merged_and_loaded(model, base, tmp_path):
    recipe = recipe_for(base, model, rank=4)
    folder = finetune(recipe, tmp_path / "run")
    adapter = tmp_path / "run/adapter"
    assert not (adapter / "config.json").exists() and not (adapter / "model.safetensors").exists()
    adapter_size = (adapter / "adapter_model.safetensors").stat().st_size
    assert adapter_size < 0.7 * (folder / "model.safetensors").stat().st_size
    merged, tokenizer = load_language_model_and_tokenizer(str(folder))
    loaded, _ = load_language_model_and_tokenizer(str(adapter))
    assert type(merged) is type(loaded)
    pairs = zip(merged.named_parameters(), loaded.named_parameters(), strict=True)
    for (name, weight), (_, loaded_weight) in pairs:
        assert_close(weight, loaded_weight, msg=name)
    base_weights = weights_of(base / model / "model")
    changed = {
        name
        for name, weight in merged.state_dict().items()
        if (weight - base_weights[name]).abs().max() > 1e-6
    }
    assert changed and all(name.endswith(".weight") for name in changed)
    assert not any(name.startswith(("autoencoder", "backbone.embed", "model.embed")) for name in changed)
    texts = [continue_texts(m, tokenizer, ["The cat says"], temperature=1, seed=1) for m in (merged, loaded)]
    assert texts[0] == texts[1]
    again = recipe_for(base, model)  # All weights of a model with adapters can be trained.
    again.model = str(adapter)
    tuned = weights_of(finetune(again, tmp_path / "again"))
    assert any((tuned[name] - weight).abs().max() > 1e-6 for name, weight in merged.state_dict().items())
    assert config_of(str(adapter)).to_dict()["model_type"] == merged.config.model_type


def test_adapters_wrap_only_the_parts_that_the_recipe_names(base):
    for layers, parts in {"backbone": {"backbone", "projection"}, "head": {"head"}}.items():
        model, _ = load_language_model_and_tokenizer(str(base / "calm/model"))
        adapted = with_adapters(model, LoraSettings(rank=2, layers=layers), "base")
        trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
        assert {name.split(".")[2] for name in trained} == parts
        assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("head_type", HEADS)
def test_every_adapter_gets_a_gradient(head_type):
    """An adapter around a layer that is never called would learn nothing, and stop distributed training."""
    backbone_input = "tokens" if head_type == "decoder" else "both"
    model = tiny_model(head_config={"head_type": head_type}, backbone_input=backbone_input)
    adapted = with_adapters(model, LoraSettings(rank=2), "base").train()
    tokens = torch.randint(3, 40, (2, 32))
    loss = adapted(input_ids=tokens, labels=tokens, position_ids=torch.arange(8).repeat(2, 1)).loss
    loss.backward()
    trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert [name for name, weight in trained.items() if weight.grad is None] == []
    assert sum(weight.grad.abs().sum() > 0 for name, weight in trained.items() if "lora_B" in name) > 10


def test_two_processes_train_the_same_model_as_one(base, tmp_path):
    recipe = recipe_for(base, rank=4)
    finetune(recipe, tmp_path / "alone")
    write_recipe(recipe, tmp_path / "recipe.yaml")
    arguments = ("--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "two")
    result = launch(2, *arguments, command="finetune")
    assert result.returncode == 0, result.stderr[-3000:]
    for name, weight in weights_of(tmp_path / "alone/model").items():
        assert_close(weights_of(tmp_path / "two/model")[name], weight, rtol=0, atol=1e-4)
    assert answers_of(tmp_path / "two") == answers_of(tmp_path / "alone")


@pytest.mark.parametrize("rank", [0, 4])
def test_resumed_equals_uninterrupted(rank, base, tmp_path, monkeypatch):
    recipe = recipe_for(base, rank=rank)
    finetune(recipe, tmp_path / "uninterrupted")
    training_step = ChunkTrainer.training_step

    def interrupted(self, *arguments, **settings):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return training_step(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe, tmp_path / "run")
    assert not (tmp_path / "run/model").exists()
    finetune(recipe, tmp_path / "run", resume=True)
    for name, weight in weights_of(tmp_path / "uninterrupted/model").items():
        assert torch.equal(weight, weights_of(tmp_path / "run/model")[name]), name
    assert answers_of(tmp_path / "run") == answers_of(tmp_path / "uninterrupted")


def test_a_finished_run_is_left_alone(base, tmp_path):
    recipe = recipe_for(base, steps=1)
    folder = finetune(recipe, tmp_path / "run")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    finetune(recipe, tmp_path / "run", resume=True)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="is not empty"):
        finetune(recipe, tmp_path / "run")
    with pytest.raises(InputError, match=r"the recipe differs in lora\.rank"):
        finetune(with_settings(recipe, {"lora.rank": 2}), tmp_path / "run", resume=True)


INVALID = {
    "model": ({"model": ""}, "names no model"),
    "sources": ({"examples.sources": []}, "names no examples"),
    "optimizer": ({"training.optimizer.name": "none"}, "no optimizer 'none'"),
    "steps": ({"training.steps": 0}, "training.steps must be at least 1 and .*, got 0"),
    "tokens": ({"training.batch_tokens": 33}, "training.batch_tokens must be a multiple of 32"),
    "context": ({"examples.context": 30, "training.batch_tokens": 120}, "multiple of the chunk size 4"),
    "dropout": (
        {"lora.rank": 2, "lora.dropout": 1.0},
        "lora.dropout must be .* below 1, got 1.0",
    ),
}


@pytest.mark.parametrize(("changes", "message"), INVALID.values(), ids=INVALID)
def test_invalid_recipes_are_refused(changes, message, base, tmp_path):
    with pytest.raises(InputError, match=message):
        finetune(with_settings(recipe_for(base), changes), tmp_path / "run")


def test_adapters_cannot_be_loaded_without_their_base_model(base, tmp_path):
    shutil.copytree(base / "calm/model", tmp_path / "model")
    recipe = with_settings(recipe_for(base, rank=2, steps=1), {"model": str(tmp_path / "model")})
    finetune(recipe, tmp_path / "run")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(InputError, match=r"the base model of the adapters in '.*': cannot load"):
        load_language_model_and_tokenizer(str(tmp_path / "run/adapter"))


def test_models_that_cannot_separate_packed_examples_are_refused(tmp_path):
    (tmp_path / "examples.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    tokenizer, sizes = train_tokenizer(stories(0, 20), 300), {"vocab_size": 300, "hidden_size": 16}
    for name, model in {
        "mamba": MambaForCausalLM(MambaConfig(**sizes, num_hidden_layers=1)),
        "bloom": BloomForCausalLM(BloomConfig(**sizes, n_layer=1, n_head=2)),
    }.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        examples = ExampleSettings(sources=str(tmp_path / "examples.jsonl"))
        recipe = FinetuningRecipe(model=str(tmp_path / name), examples=examples)
        with pytest.raises(InputError, match=f"'{name}' models cannot be scored"):
            finetune(recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_base_model_of_adapters_is_not_overwritten(tmp_path):
    """Nor that of adapters on top of adapters."""
    (tmp_path / "run/model").mkdir(parents=True)
    for name, base_model in (("adapter", "run/model"), ("another", "adapter")):
        (tmp_path / name).mkdir()
        settings = json.dumps({"base_model_name_or_path": str(tmp_path / base_model)})
        (tmp_path / name / "adapter_config.json").write_text(settings)
        recipe = FinetuningRecipe(model=str(tmp_path / name), examples=ExampleSettings(sources="there.jsonl"))
        with pytest.raises(InputError, match=r"model' lies in the output folder"):
            finetune(recipe, tmp_path / "run", overwrite=True)
        assert (tmp_path / "run/model").is_dir()


def test_missing_peft_is_an_error(base, monkeypatch):
    model, _ = load_language_model_and_tokenizer(str(base / "calm/model"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"lora.rank needs peft, which is not installed: pip install peft$"):
        with_adapters(model, LoraSettings(rank=2), "base")


def test_shipped_recipes_run_from_the_command_line(base, tmp_path, capsys):
    shipped = shipped_recipes(FinetuningRecipe)
    assert shipped.keys() == {"full", "lora", "thoughts"}
    for name in shipped:
        recipe = read_recipe_of(FinetuningRecipe, name)
        assert (recipe.lora.rank > 0) == (name == "lora")
        smaller = ["--examples.context", "32", "--training.batch_tokens", "64", "--training.steps", "2"]
        main(
            ["finetune", "--recipe", name, "--model", str(base / "calm/model"), *smaller,
             "--answers.number", "2", "--examples.sources", str(base / "examples.jsonl"),
             "--output", str(tmp_path / name), *(["--thoughts.stages", "0"] if name == "thoughts" else [])]
        )  # fmt: skip
        out = capsys.readouterr().out
        assert "108 examples in" in out and f"model:  {tmp_path / name / 'model'}" in out
    message = failure(capsys, "finetune", "--recipe", "none", "--output", tmp_path / "x")
    assert "there is no recipe 'none'; give a .yaml file or one of: full, lora, thoughts" in message
    write_recipe(recipe_for(base), tmp_path / "mine.yaml")
    assert read_recipe_of(FinetuningRecipe, str(tmp_path / "mine.yaml")) == recipe_for(base)


@pytest.mark.parametrize("rank", [0, 2])
def test_extended_run_equals_a_longer_run(rank, base, tmp_path):
    schedule = OptimizerSettings(name="adamw", learning_rate=1e-2, warmup_steps=2, schedule="constant")
    short, long = (recipe_for(base, rank=rank, steps=steps, optimizer=schedule) for steps in (5, 9))
    finetune(short, tmp_path / "run")
    finetune(long, tmp_path / "run", resume=True)
    finetune(long, tmp_path / "long")
    expected = ["model-5", "adapter-5"] if rank else ["model-5"]
    assert sorted(path.name for path in (tmp_path / "run").glob("*-5")) == sorted(expected)
    first, second = (weights_of(tmp_path / run / "model") for run in ("run", "long"))
    assert all((first[name] == second[name]).all() for name in first)
