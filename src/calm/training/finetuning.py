"""Supervised fine-tuning on prompts and completions, of all weights or with low-rank adapters.

output/
  recipe.yaml    the resolved recipe
  inputs.json    digests of the run's inputs
  checkpoints/   checkpoints
  adapter/       the adapters, if any were trained
  model/         the result: a self-contained model folder, adapters merged
  examples.json  how many examples there were
  answers.jsonl  held-out prompts, the expected completions, and the answers before and after training
  history.json   logged losses, held-out scores and times
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from calm.data.chunking import check_block_size
from calm.data.examples import Example, lay_out, read_examples, set_chat_template, split_examples
from calm.evaluation.answers import answer, completions_of, held_out_loss, metric_of_answers
from calm.evaluation.scorers import scorer_of
from calm.hub.opening import read_settings
from calm.models.language_model import language_model
from calm.models.loading import THOUGHTS, add_eos_ids, is_adapter, load_language_model_and_tokenizer
from calm.models.shipped import folder_of
from calm.models.thoughts import unlearn_thoughts
from calm.storage.disk import write_atomically
from calm.text.decoding import decode_after
from calm.training.adapters import check_adapters, merge_adapters, with_adapters
from calm.training.arguments import Hooks, Score, TrainingStage
from calm.training.blocks import Blocks
from calm.training.check import check_finetuning_recipe
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.inputs import check_recipe_and_inputs, digest_of_examples, digest_of_weights
from calm.training.optimizers import build_optimizer
from calm.training.precision import with_precision
from calm.training.processes import processes
from calm.training.runs import Run
from calm.training.thinking import StageChange, ThinkingRows, ThoughtTraining, thinking_of
from calm.training.trackers import tracking_of
from calm.training.trainer import ChunkTrainer

logger = logging.getLogger(__name__)
ANSWERS, COUNTS = "answers.jsonl", "examples.json"


def finetune(
    recipe: FinetuningRecipe,
    output: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    scores: Sequence[Score] = (),
) -> Path:
    """Fine-tune a model on examples; parts of the run that are finished are skipped.

    Args:
        recipe: The recipe.
        output: Folder of the run; see the layout at the top of this file.
        resume: Whether to resume the run in that folder.
        overwrite: Whether to replace the contents of that folder.
        callbacks: Callbacks of transformers' Trainer.
        scores: Functions (model, held-out blocks) -> scores by name, which are logged and recorded beside the
            package's own at each evaluation.

    Returns:
        The model folder.

    Raises:
        InputError: If a setting, the examples or the folder are not valid.
        RunError: If the run cannot continue; see `ChunkTrainer.train_or_resume`.
    """
    check_finetuning_recipe(recipe, processes().num_processes)
    output = Path(output)
    recipe = with_precision(recipe, output, resume)
    run = Run(recipe, output, resume, overwrite)
    with run.locked(_input_paths(recipe)):
        model, tokenizer = _load(recipe)
        thinking = thinking_of(recipe, model, tokenizer)
        examples, held_out = _read(recipe, tokenizer)
        blocks, counts = _lay_out(recipe, model, tokenizer, examples, held_out, thinking)
        if processes().is_main_process:
            inputs = {
                f"the model '{recipe.model}'": digest_of_weights(model),
                "its examples (with the tokenizer)": digest_of_examples([*examples, *held_out]),
            }
            with run.set_up():
                check_recipe_and_inputs(output, recipe, inputs)
        processes().wait_for_everyone()
        if not run.has_model("model"):
            _report_counts(run, counts)
            _train(run, model, tokenizer, blocks, held_out, thinking, Hooks(callbacks, scores))
    return output / "model"


def _load(recipe: FinetuningRecipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train, checked against the recipe."""
    model, tokenizer = load_language_model_and_tokenizer(recipe.model, dtype=torch.float32)
    scorer_of(model)  # Examples share blocks as held-out text does, which not every model keeps apart.
    if recipe.thoughts.mode == "none":
        unlearn_thoughts(model.config, recipe.model, "with thoughts.mode none")
    set_chat_template(tokenizer, recipe.examples.chat_template)
    add_eos_ids(model, tokenizer)
    check_block_size(recipe.examples.context, language_model(model).chunk_size)
    if recipe.lora.rank:
        check_adapters(model, recipe.lora)
    return model, tokenizer


def _read(
    recipe: FinetuningRecipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], list[Example]]:
    settings, mode = recipe.examples, recipe.thoughts.mode

    def read(sources: list[str]) -> list[list[Example]]:
        conversations = read_examples(sources, tokenizer, with_steps=mode != "none")
        if mode != "none":
            _warn_without_steps(conversations, sources, mode)
        return conversations

    conversations = read(settings.source_list)
    if not settings.validation_source_list:
        return split_examples(conversations, settings.validation_fraction, recipe.seed)
    held_out = read(settings.validation_source_list)
    return [example for c in conversations for example in c], [example for c in held_out for example in c]


def _warn_without_steps(conversations: list[list[Example]], sources: list[str], mode: str) -> None:
    """Warn if no record has steps: that is allowed, but usually a misspelled field."""
    if processes().is_main_process and not any(example.steps for c in conversations for example in c):
        logger.warning(
            "no record of %s has 'steps', so thoughts.mode %s has no steps to leave out or to train on; "
            "give each record a list 'steps', or set thoughts.mode to none.",
            ", ".join(sources),
            mode,
        )


def _input_paths(recipe: FinetuningRecipe) -> list[str]:
    """Paths and names of everything a recipe reads."""
    examples = recipe.examples
    names = [*_models_of(recipe.model), *examples.source_list, *examples.validation_source_list]
    return [*names, examples.chat_template] if examples.chat_template else names


def _models_of(name: str) -> list[str]:
    """A model and, if it is a folder of adapters, the model they belong to, which may be adapters as well."""
    names: list[str] = []
    while name not in names:
        names.append(name)
        if is_adapter(folder := Path(folder_of(name))):
            name = str(read_settings(folder / "adapter_config.json").get("base_model_name_or_path") or name)
    return names


def _train(
    run: Run[FinetuningRecipe],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Blocks,
    held_out: list[Example],
    thinking: ThoughtTraining | None,
    hooks: Hooks,
) -> None:
    recipe, settings = run.recipe, run.recipe.training
    to_answer = held_out[: recipe.answers.number]

    def answers_of(model: PreTrainedModel) -> list[str]:
        return answer(
            model,
            tokenizer,
            to_answer,
            temperature=recipe.answers.temperature,
            num_draws=recipe.answers.num_draws,
            seed=recipe.seed,
            max_new_tokens=None if thinking is None else thinking.longest_answer(to_answer),
        )

    def score(scored: PreTrainedModel, blocks: Any) -> dict[str, float]:
        if thinking is None:
            loss = held_out_loss(scored, blocks, settings.evaluation_blocks)
        else:
            loss = thinking.loss(scored, blocks[: settings.evaluation_blocks])
        metrics = {"held_out_loss": loss}
        if to_answer:
            name, metric = metric_of_answers(may_begin_with_steps=thinking is not None)
            metrics[name] = metric(answers_of(scored), completions_of(to_answer, tokenizer))
        return metrics

    before = answers_of(model)
    set_seed(recipe.seed)
    adapted = with_adapters(model, recipe.lora, recipe.model) if recipe.lora.rank else None
    folder, tracking = run.folder / "checkpoints", tracking_of(run)
    stage = TrainingStage(
        "model", settings, folder, recipe.seed, is_last=True, tracking=tracking, hooks=hooks
    )
    trainer = ChunkTrainer(model, blocks, score, stage, adapted)
    if thinking is not None:
        trained = model if adapted is None else adapted

        def new_optimizer() -> torch.optim.Optimizer:
            return build_optimizer(trained, settings.optimizer, settings.precision)

        build_new = new_optimizer if recipe.thoughts.reset_optimizer else None
        trainer.add_callback(StageChange(thinking, model, build_new))
    trainer.train_or_resume()
    model.config.use_cache = True  # The Trainer turns it off, and that would be saved.
    after = answers_of(model.eval())
    run.save_history(trainer.state.log_history)
    if processes().is_main_process:
        write_atomically(run.folder / ANSWERS, _answers_as_jsonl(to_answer, before, after, tokenizer))
    if adapted is not None:
        if not run.has_model("adapter"):
            # Written even if empty, since the base model may have been trained with thoughts.
            thoughts = getattr(model.config, "thoughts", None) or {}
            run.save_model("adapter", adapted, tokenizer, {THOUGHTS: thoughts})
        model = merge_adapters(adapted)
    run.save_model("model", model, tokenizer)


def _lay_out(
    recipe: FinetuningRecipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    held_out: list[Example],
    thinking: ThoughtTraining | None,
) -> tuple[Blocks, dict[str, int]]:
    """The blocks of the examples, and the counts of examples and of training blocks."""
    context, settings = recipe.examples.context, recipe.training
    if thinking is not None:
        shortened = thinking.num_shortened(examples)
        thinking.num_shortened(held_out)  # They have to fit as well.
        rows = ThinkingRows(thinking, examples, settings.batch_tokens // context, settings.steps, recipe.seed)
        blocks = Blocks(rows, held_out, context, tokenizer, thinking.collate, is_in_order=True)
        num_blocks = len(examples)
    else:
        layout = {
            "chunk_size": language_model(model).chunk_size,
            "block_size": context,
            "pad_token_id": tokenizer.pad_token_id,
        }
        training, shortened = lay_out(examples, **layout)
        blocks = Blocks(training, lay_out(held_out, **layout)[0], context, tokenizer)
        num_blocks = len(training)
    counts = {"examples": len(examples), "shortened": shortened, "held_out": len(held_out)}
    return blocks, counts | {"blocks": num_blocks}


def _report_counts(run: Run[FinetuningRecipe], counts: dict[str, int]) -> None:
    """Print and record how many examples there are."""
    if not processes().is_main_process:
        return
    settings = run.recipe.training
    epochs = settings.tokens / (counts["blocks"] * run.recipe.examples.context)
    print(
        f"{counts['examples']} examples in {counts['blocks']} blocks ({counts['shortened']} shortened to "
        f"fit), {counts['held_out']} held out; {settings.steps} steps are {epochs:.1f} epochs"
    )
    recorded = {name: counts[name] for name in ("examples", "shortened", "held_out")}
    write_atomically(run.folder / COUNTS, json.dumps(recorded) + "\n")


def _answers_as_jsonl(
    examples: list[Example], before: list[str], after: list[str], tokenizer: PreTrainedTokenizerBase
) -> str:
    prompts = [decode_after(tokenizer, [], example.prompt) for example in examples]
    rows = zip(prompts, completions_of(examples, tokenizer), before, after, strict=True)
    names = ("prompt", "completion", "before", "after")
    return "".join(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
