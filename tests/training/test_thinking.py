"""Fine-tuning with continuous thoughts: stages, exact resuming, adapters, and what is refused."""

import json
import re
import warnings

import pytest
import torch
from processes import launch
from safetensors.torch import load_file
from tiny import tiny_model
from torch.testing import assert_close
from toy import failure, interrupt
from transformers import LlamaConfig

from calm.data.reasoning import ThinkingRow
from calm.data.tasks import write_items
from calm.data.tokenizer import train_tokenizer
from calm.errors import InputError
from calm.evaluation.answers import completions_of
from calm.models.loading import load_language_model_and_tokenizer
from calm.models.thoughts import Thoughts, thoughts_of
from calm.models.tokens import LlamaForCausalLM
from calm.sharing.card import CardDetails
from calm.sharing.finetuned import card_of_finetuning
from calm.texts import continue_texts
from calm.training.batches import NUMBERS
from calm.training.finetuning import finetune
from calm.training.finetuning_recipe import (
    AnswerSettings,
    ExampleSettings,
    FinetuningRecipe,
    ThoughtSettings,
)
from calm.training.recipe import OptimizerSettings, TrainingSettings
from calm.training.recipe_files import with_settings, write_recipe
from calm.training.runs import Run
from calm.training.thinking import StageChange, thinking_of

MARKERS = (2, 1)  # BOS and EOS.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An untrained CALM with each of two heads and a Llama, with a tokenizer, and questions of two steps."""
    folder = tmp_path_factory.mktemp("base")
    write_items(folder / "items.jsonl", "chain", 2, 1, 60, False)
    records = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer((" ".join([record["prompt"], *record["steps"]]) for record in records), 330)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    tokenizer.save_pretrained(folder / "calm")
    calm = tiny_model(2, vocab_size=len(tokenizer), head_config={"head_type": "sequential"})
    calm.save_pretrained(folder / "calm")
    tiny_model(2, vocab_size=len(tokenizer)).save_pretrained(folder / "energy")
    tokenizer.save_pretrained(folder / "energy")
    llama = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, **sizes
    )
    torch.manual_seed(1)
    LlamaForCausalLM(llama).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    return folder


def recipe_for(base, model="plain", thoughts=None, **training):
    settings = {"mode": "state", "stages": 2, "steps_per_stage": 3, "mix": 0.2}
    return FinetuningRecipe(
        seed=2,
        model=str(base / model),
        examples=ExampleSettings(sources=str(base / "items.jsonl"), context=64),
        thoughts=ThoughtSettings(**settings | (thoughts or {})),
        answers=AnswerSettings(number=4, num_draws=4),
        training=TrainingSettings(
            **{
                "steps": 9,
                "batch_tokens": 256,
                "evaluate_every": 3,
                "save_every": 3,
                "log_every": 1,
                "optimizer": OptimizerSettings(name="adamw", learning_rate=1e-2, warmup_steps=2),
            }
            | training
        ),
    )


def weights_of(run):
    return load_file(run / "model/model.safetensors")


def losses_of(run):
    return [entry["loss"] for entry in json.loads((run / "history.json").read_text()) if "loss" in entry]


@pytest.mark.parametrize("model", ["plain", "calm", "energy"])
@pytest.mark.parametrize("mode", ["state", "pause", "drop"])
def test_every_model_trains_in_every_mode(model, mode, base, tmp_path):
    finetune(recipe_for(base, model, {"mode": mode}), tmp_path / "run")
    loaded, _ = load_language_model_and_tokenizer(str(tmp_path / "run"))
    thoughts = thoughts_of(loaded.config)
    if mode == "drop":
        assert thoughts is None
    else:
        assert thoughts == Thoughts(2, *MARKERS, mode)
    history = json.loads((tmp_path / "run/history.json").read_text())
    scored = [entry for entry in history if "eval_ends_with_completion" in entry]
    assert [entry["step"] for entry in scored] == [3, 6, 9]
    assert not any("eval_exact_match" in entry for entry in history)  # Answers may begin with steps.
    answers = [json.loads(line) for line in (tmp_path / "run/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and not any("<|" in answer["after"] for answer in answers)


@pytest.mark.parametrize(
    ("killed_at", "model", "optimizer"),
    [(3, "plain", "adamw"), (5, "plain", "muon"), (3, "calm", "muon"), (5, "calm", "adamw")],
)
def test_resumed_equals_uninterrupted(killed_at, model, optimizer, base, tmp_path, monkeypatch):
    """Killed where a stage changes, and within one."""
    recipe = recipe_for(base, model, optimizer=OptimizerSettings(name=optimizer, warmup_steps=2))
    finetune(recipe, tmp_path / "uninterrupted")
    with monkeypatch.context() as patch:
        interrupt(patch, "checkpoints", killed_at)
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe, tmp_path / "run")
    finetune(recipe, tmp_path / "run", resume=True)
    for name, weight in weights_of(tmp_path / "uninterrupted").items():
        assert torch.equal(weight, weights_of(tmp_path / "run")[name]), name
    assert (tmp_path / "run/answers.jsonl").read_text() == (
        tmp_path / "uninterrupted/answers.jsonl"
    ).read_text()


def test_a_run_killed_after_its_last_step_still_thinks(base, tmp_path, monkeypatch):
    """It resumes without training a step, but answers and saves as in the last stage."""
    finetune(recipe_for(base), tmp_path / "uninterrupted")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe_for(base), tmp_path / "run")
    assert (tmp_path / "run/checkpoints/checkpoint-9").is_dir()
    finetune(recipe_for(base), tmp_path / "run", resume=True)
    for part in ("model/config.json", "answers.jsonl"):
        assert (tmp_path / "run" / part).read_text() == (tmp_path / "uninterrupted" / part).read_text()


def test_two_processes_train_the_same_model_as_one(base, tmp_path):
    # With a smaller epsilon, AdamW would turn gradients that are rounding errors into steps.
    optimizer = OptimizerSettings(name="adamw", learning_rate=1e-2, warmup_steps=2, epsilon=1e-3)
    recipe = recipe_for(base, "calm", optimizer=optimizer)
    finetune(recipe, tmp_path / "alone")
    write_recipe(recipe, tmp_path / "recipe.yaml")
    arguments = ("--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "two")
    result = launch(2, *arguments, command="finetune")
    assert result.returncode == 0, result.stderr[-3000:]
    for name, weight in weights_of(tmp_path / "alone").items():
        assert_close(weights_of(tmp_path / "two")[name], weight, rtol=0, atol=1e-4)


def test_microbatches_of_different_stages_are_summed(base, tmp_path):
    """Rows of different stages are in different microbatches."""
    finetune(recipe_for(base), tmp_path / "at_once")
    finetune(recipe_for(base, microbatch_tokens=64), tmp_path / "in_parts")
    assert_close(
        torch.tensor(losses_of(tmp_path / "at_once")), torch.tensor(losses_of(tmp_path / "in_parts"))
    )


def test_noise_of_an_energy_head_depends_on_the_row(base, tmp_path):
    finetune(recipe_for(base, "energy"), tmp_path / "at_once")
    finetune(recipe_for(base, "energy", microbatch_tokens=64), tmp_path / "in_parts")
    model, tokenizer = load_language_model_and_tokenizer(str(base / "energy"))
    thinking = thinking_of(recipe_for(base, "energy"), model, tokenizer)
    rows = [ThinkingRow([2, word], [5, 1], [-100, -100, 5, 1]) for word in (7, 8, 7)]
    numbers = thinking.collate(rows)[NUMBERS].tolist()
    assert numbers[0] == numbers[2] != numbers[1]
    assert_close(
        torch.tensor(losses_of(tmp_path / "at_once")), torch.tensor(losses_of(tmp_path / "in_parts"))
    )


def test_optimizer_is_reset_only_where_a_stage_begins(base, tmp_path, monkeypatch):
    steps = []
    original = StageChange.on_step_begin

    def recorded(self, args, state, control, optimizer=None, **others):
        before = len(optimizer.state)
        original(self, args, state, control, optimizer=optimizer, **others)
        if before and not optimizer.state:
            steps.append(state.global_step)

    monkeypatch.setattr(StageChange, "on_step_begin", recorded)
    finetune(recipe_for(base), tmp_path / "run")
    assert steps == [3, 6]
    steps.clear()
    finetune(recipe_for(base, thoughts={"reset_optimizer": False}), tmp_path / "other")
    assert steps == []


def test_rms_scale_is_that_of_the_embeddings(base):
    model, tokenizer = load_language_model_and_tokenizer(str(base / "plain"))
    thinking = thinking_of(recipe_for(base, thoughts={"scale": "rms"}), model, tokenizer)
    embedding = model.get_input_embeddings().weight
    assert thinking.thoughts.scale == pytest.approx(embedding.pow(2).mean().sqrt().item())
    model, tokenizer = load_language_model_and_tokenizer(str(base / "calm"))
    thinking = thinking_of(recipe_for(base, "calm", {"scale": "rms"}), model, tokenizer)
    assert thinking.thoughts.scale == pytest.approx(1.0)  # States leave a new norm with an RMS of 1.


def test_adapters_cause_no_warnings_and_do_not_ask_the_hub(base, tmp_path, monkeypatch):
    """peft would look for the base model by name, even on the hub, and warn; and of its own old names."""
    import peft.utils.other
    import peft.utils.save_and_load

    for module in (peft.utils.other, peft.utils.save_and_load):
        monkeypatch.setattr(
            module, "check_file_exists_on_hf_hub", lambda *_: pytest.fail("the hub was asked")
        )
    recipe = with_settings(recipe_for(base), {"lora.rank": 2})
    finetune(recipe, tmp_path / "first")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = with_settings(recipe, {"model": str(tmp_path / "first/adapter")})
        finetune(again, tmp_path / "second")
        load_language_model_and_tokenizer(str(tmp_path / "second/adapter"))
    assert not [
        warning for warning in caught if "peft" in warning.filename or "checkpointing" in str(warning.message)
    ]


def test_adapters_think_like_the_merged_model(base, tmp_path):
    for name in ("calm", "plain"):
        recipe = recipe_for(base, name)
        recipe.lora.rank = 2
        finetune(recipe, tmp_path / name)
        folders = (tmp_path / name / part for part in ("model", "adapter"))
        models = [load_language_model_and_tokenizer(str(folder)) for folder in folders]
        assert [thoughts_of(model.config) for model, _ in models] == [Thoughts(2, *MARKERS)] * 2
        answers = [continue_texts(*model, ["a ? b :"], temperature=0.0) for model in models]
        assert answers[0] == answers[1]
    (tmp_path / "plain/adapter/thoughts.json").write_text('{"number": -1}')
    with pytest.raises(InputError, match="thoughts"):
        load_language_model_and_tokenizer(str(tmp_path / "plain/adapter"))


@pytest.mark.parametrize("mode", ["drop", "none"])
def test_adapters_trained_without_thoughts_do_not_think(mode, base, tmp_path):
    finetune(recipe_for(base), tmp_path / "thinks")
    recipe = recipe_for(base, thoughts={"mode": mode})
    recipe.model, recipe.lora.rank = str(tmp_path / "thinks"), 2
    finetune(recipe, tmp_path / "run")
    folders = (tmp_path / "run" / part for part in ("model", "adapter"))
    models = [load_language_model_and_tokenizer(str(folder)) for folder in folders]
    assert [thoughts_of(model.config) for model, _ in models] == [None] * 2
    answers = [continue_texts(*model, ["a ? b :"], temperature=0.0) for model in models]
    assert answers[0] == answers[1]
    finetune(recipe, tmp_path / "run", overwrite=True)  # Every file in it is recognized as ours.


@pytest.mark.parametrize("mode", ["drop", "none"])
def test_model_trained_further_without_thoughts_no_longer_thinks(mode, base, tmp_path, caplog):
    finetune(recipe_for(base), tmp_path / "thinks")
    recipe = recipe_for(base, thoughts={"mode": mode})
    recipe.model = str(tmp_path / "thinks")
    finetune(recipe, tmp_path / "run")
    loaded, _ = load_language_model_and_tokenizer(str(tmp_path / "run"))
    assert thoughts_of(loaded.config) is None
    assert ("it will no longer use them" in caplog.text) == (mode == "none")


INVALID = {
    "supervised": ({"mode": "drop", "supervised": True}, {}, "nothing .*supervised"),
    "scale": ({"mode": "pause", "scale": "rms"}, {}, "thoughts.scale is for thoughts.mode state"),
    "numbers": ({"stages": 200, "per_step": 100}, {}, "would begin at step|times thoughts.per_step"),
    "too many stages": ({"steps_per_stage": 5}, {}, "would begin at step 10 of 9"),
    "markers": ({"markers": ["<bot>", "<eot>"]}, {}, "must be two tokens of the tokenizer, got <bot>, <eot>"),
    "one marker": ({"markers": ["<|eos|>"]}, {}, "must be two tokens"),
    "checkpointing": ({}, {"gradient_checkpointing": True}, "gradient_checkpointing does not work with"),
    "compile": ({}, {"compile": True}, "compile does not work with"),
    "mix": ({"mix": 1.5}, {}, "thoughts.mix must be at least 0 and at most 1"),
    "thoughts": (
        {"per_step": 50},
        {},
        "items.jsonl', line 1: .* leave no room for a prompt in a context of 64",
    ),
    "stages": ({"stages": -1}, {}, "thoughts.stages must"),
}


@pytest.mark.parametrize(("thoughts", "training", "message"), INVALID.values(), ids=INVALID)
def test_invalid_recipes_are_refused(thoughts, training, message, base, tmp_path):
    with pytest.raises(InputError, match=message):
        finetune(recipe_for(base, thoughts=thoughts, **training), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("index", [0, 15, 58])
def test_an_example_that_does_not_fit_is_named_by_its_line(index, base, tmp_path):
    """However the examples are split, and whichever other files there are."""
    lines = (base / "items.jsonl").read_text().splitlines()
    long = json.loads(lines[index]) | {"steps": ["b = 5 ." * 40]}
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files[0].write_text("\n".join(lines))
    files[1].write_text("\n".join([*lines[:index], json.dumps(long), *lines[index + 1 :]]))
    recipe = with_settings(recipe_for(base), {"examples.sources": [str(file) for file in files]})
    message = rf"^'{re.escape(str(files[1]))}', line {index + 1}: .* leave no room for a prompt"
    with pytest.raises(InputError, match=message):
        finetune(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["state", "none"])
def test_only_training_examples_are_counted_as_shortened(mode, base, tmp_path, monkeypatch):
    records = [json.loads(line) for line in (base / "items.jsonl").read_text().splitlines()]
    for name, long in {"items": records[:2], "held_out": records}.items():
        rows = [record | {"prompt": record["prompt"] * (9 if record in long else 1)} for record in records]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"examples.sources": "items.jsonl", "examples.validation_sources": "held_out.jsonl"}
    settings = {name: str(tmp_path / file) for name, file in settings.items()}
    monkeypatch.setattr("calm.training.finetuning._train", lambda *_: None)
    finetune(with_settings(recipe_for(base, thoughts={"mode": mode}), settings), tmp_path / "run")
    counts = json.loads((tmp_path / "run/examples.json").read_text())
    assert counts == {"examples": 60, "shortened": 2, "held_out": 60}


@pytest.mark.parametrize("side", ["sources", "validation_sources"])
def test_files_without_any_steps_are_warned_about(side, base, tmp_path, caplog, monkeypatch):
    """The field may be misspelled; the run continues, in case it is meant."""
    records = [json.loads(line) for line in (base / "items.jsonl").read_text().splitlines()]
    file = tmp_path / "misspelled.jsonl"
    file.write_text(
        "\n".join(json.dumps({**record, "stepz": record["steps"], "steps": None}) for record in records)
    )
    sources = {"sources": str(base / "items.jsonl"), "validation_sources": str(base / "items.jsonl")}
    settings = {f"examples.{name}": value for name, value in (sources | {side: str(file)}).items()}
    monkeypatch.setattr("calm.training.finetuning._train", lambda *_: None)
    finetune(with_settings(recipe_for(base), settings), tmp_path / "run")
    [message] = [entry.getMessage() for entry in caplog.records if "'steps'" in entry.getMessage()]
    assert message.startswith(f"no record of {file} has 'steps'") and "thoughts.mode state" in message
    caplog.clear()
    finetune(recipe_for(base), tmp_path / "other")
    assert "'steps'" not in caplog.text


def test_a_context_beyond_the_model_is_refused(base, tmp_path):
    recipe = recipe_for(base, "calm", batch_tokens=256)
    recipe.examples.context = 256  # The tiny model has 64 chunks of two.
    with pytest.raises(InputError, match="the model's context is 128 tokens"):
        finetune(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mode", "metric", "percent"), [("state", "ends_with_completion", 100), ("none", "exact_match", 0)]
)
def test_answers_with_steps_count_as_correct_if_steps_are_trained(
    mode, metric, percent, base, tmp_path, monkeypatch
):
    limits = []

    def answers(model, tokenizer, examples, *, max_new_tokens, **_):
        limits.append(max_new_tokens)
        return [f"b = 5 .{text}" for text in completions_of(examples, tokenizer)]

    monkeypatch.setattr("calm.training.finetuning.answer", answers)
    finetune(recipe_for(base, thoughts={"mode": mode}), tmp_path / "run")
    history = json.loads((tmp_path / "run/history.json").read_text())
    assert {entry[f"eval_{metric}"] for entry in history if f"eval_{metric}" in entry} == {percent}
    # Before training, after each stage, and at the end. The stages write two steps, one and none.
    two_steps, _, one_step, no_steps, _ = limits
    assert limits == [two_steps, two_steps, one_step, no_steps, no_steps]
    assert two_steps is None if mode == "none" else two_steps > one_step > no_steps


def test_the_card_counts_answers_as_the_run_does(base, tmp_path):
    """Steps before the completion do not make an answer wrong."""
    run = tmp_path / "run"
    finetune(recipe_for(base), run)
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    correct = [row | {"before": "no", "after": f"a = 3 . {row['completion']}"} for row in rows]
    (run / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in correct))
    card = card_of_finetuning(run, CardDetails("thinker"))
    assert "Of 4 held-out prompts, 0% were answered with words that end with the expected" in card
    assert "100% after" in card and "value: 100.0" in card
    assert "type: ends_with_completion" in card and "name: Ends with completion" in card
    assert "exact" not in card


def test_invalid_option_of_the_command_line_is_refused(base, tmp_path, capsys):
    arguments = ("finetune", "--model", base / "plain", "--examples.sources", base / "items.jsonl")
    message = failure(
        capsys, *arguments, "--output", tmp_path / "run", "--thoughts.mode", "state", "--thoughts.mix", "2"
    )
    assert "thoughts.mix" in message and not (tmp_path / "run").exists()
