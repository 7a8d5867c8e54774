"""A model and examples -> a model that answers: supervised fine-tuning, whole or by low-rank adapters.

output/
  recipe.yaml    the resolved recipe
  inputs.json    digests of what the run began with
  checkpoints/   checkpoints and TensorBoard logs
  adapter/       the adapters, where they were trained
  model/         the result: a self-contained model folder (with the adapters added)
  examples.json  how many examples there were
  answers.jsonl  held-out prompts: what was expected, and what the model wrote before and after
  history.json   logged losses and held-out scores
"""

import json
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from calm.data.chunking import check_block_size
from calm.data.examples import Example, give_template, lay_out, read_examples, split_examples
from calm.errors import InputError
from calm.models.calm import CalmForCausalLM
from calm.models.context import room_beside
from calm.models.language_model import language_model
from calm.models.loading import end_as_told, load_language_model_and_tokenizer
from calm.storage.checksums import check_as_written
from calm.storage.disk import disk_errors, write_file_whole
from calm.storage.folders import written_whole
from calm.text.decoding import decode_behind
from calm.texts import continue_tokens
from calm.training.adapters import check_adapters, merge_adapters, with_adapters
from calm.training.configurations import check_seed, check_training
from calm.training.finetuning_recipe import AnswerSettings, FinetuningRecipe
from calm.training.inputs import (
    check_inputs,
    digest_of_examples,
    digest_of_recipe,
    digest_of_weights,
)
from calm.training.processes import processes
from calm.training.ranges import check_ranges
from calm.training.recipe_files import RECIPE, held_run_folder, opened_run_folder, write_recipe
from calm.training.trainer import ChunkTrainer

ANSWERS, COUNTS, HISTORY = "answers.jsonl", "examples.json", "history.json"
_ANSWERS_AT_ONCE = 16


def finetune(
    recipe: FinetuningRecipe, output: Path, *, resume: bool = False, overwrite: bool = False
) -> Path:
    """Train a model on examples; what is finished is kept.

    Args:
        recipe: The recipe.
        output: Folder of the run; see the layout at the top of this file.
        resume: Whether to go on with a run in that folder.
        overwrite: Whether to remove what is in that folder first.

    Returns:
        The model folder.

    Raises:
        InputError: If a setting, the examples or the folder do not fit.
        RunError: If the run cannot go on; see `ChunkTrainer.train_or_resume`.
    """
    _check(recipe)
    with held_run_folder(recipe, output, resume, overwrite, _places_of(recipe)):
        _run(recipe, output, resume)
    return output / "model"


def _run(recipe: FinetuningRecipe, output: Path, resume: bool) -> None:
    model, tokenizer = load_language_model_and_tokenizer(recipe.model, dtype=torch.float32)
    give_template(tokenizer, recipe.examples.chat_template)
    end_as_told(model, tokenizer)
    chunk_size = language_model(model).chunk_size
    check_block_size(recipe.examples.context, chunk_size)
    if recipe.lora.rank:
        check_adapters(model, recipe.lora)
    examples, held_out = _read(recipe, tokenizer)
    if processes().is_main_process:
        inputs = {
            "its recipe": digest_of_recipe(recipe),
            f"the model '{recipe.model}'": digest_of_weights(model),
            "its examples (with the tokenizer)": digest_of_examples([examples, held_out]),
        }
        with opened_run_folder(recipe, output, resume):
            check_inputs(output, inputs)
    processes().wait_for_everyone()
    if (output / "model/config.json").is_file():
        check_as_written(output / "model")
    else:
        with disk_errors(output, "with room on the disk, --resume goes on from what was finished"):
            _train(model, tokenizer, examples, held_out, recipe, output)


def _check(recipe: FinetuningRecipe) -> None:
    if not recipe.model:
        raise InputError("the recipe names no model; pass --model FOLDER.")
    if not recipe.examples.sources:
        raise InputError("the recipe names no examples; pass --examples.sources FILE.")
    check_seed(recipe.seed)
    check_ranges(recipe)
    check_training(recipe.training, "training", recipe.examples.context, processes().num_processes)


def _read(
    recipe: FinetuningRecipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], list[Example]]:
    settings = recipe.examples
    conversations = read_examples(_as_list(settings.sources), tokenizer)
    if not settings.validation_sources:
        return split_examples(conversations, settings.validation_fraction, recipe.seed)
    held_out = read_examples(_as_list(settings.validation_sources), tokenizer)
    return [example for c in conversations for example in c], [example for c in held_out for example in c]


def _places_of(recipe: FinetuningRecipe) -> list[str]:
    """Paths and names of what a recipe reads."""
    examples = recipe.examples
    named = [recipe.model, *_as_list(examples.sources), *_as_list(examples.validation_sources or [])]
    return [*named, *([examples.chat_template] if examples.chat_template else [])]


def _as_list(sources: list[str] | str) -> list[str]:
    return [sources] if isinstance(sources, str) else sources


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    held_out: list[Example],
    recipe: FinetuningRecipe,
    output: Path,
) -> None:
    context, settings = recipe.examples.context, recipe.training
    size = language_model(model).chunk_size
    layout = {"chunk_size": size, "block_size": context, "pad_token_id": tokenizer.pad_token_id}
    blocks, shortened = lay_out(examples, **layout)
    held_out_blocks, _ = lay_out(held_out, **layout)
    asked = held_out[: recipe.answers.number]
    if processes().is_main_process:
        epochs = settings.steps * settings.batch_tokens / (len(blocks) * context)
        print(
            f"{len(examples)} examples in {len(blocks)} blocks ({shortened} shortened to fit), "
            f"{len(held_out)} held out; {settings.steps} steps are {epochs:.1f} epochs"
        )
        counts = {"examples": len(examples), "shortened": shortened, "held_out": len(held_out)}
        write_file_whole(output / COUNTS, json.dumps(counts) + "\n")
    answers_before = answer(model, tokenizer, asked, recipe.answers, recipe.seed)

    def score(scored: PreTrainedModel, blocks: datasets.Dataset) -> dict[str, float]:
        metrics = {"held_out_loss": _held_out_loss(scored, blocks, settings.evaluation_blocks)}
        if asked:
            answers = answer(scored, tokenizer, asked, recipe.answers, recipe.seed)
            metrics["exact_match"] = exact_match(answers, asked, tokenizer)
        return metrics

    set_seed(recipe.seed)
    adapted = with_adapters(model, recipe.lora, recipe.model) if recipe.lora.rank else None
    trainer = ChunkTrainer(
        model,
        blocks,
        held_out_blocks,
        score,
        settings,
        output / "checkpoints",
        tokenizer,
        context,
        recipe.seed,
        adapted=adapted,
    )
    trainer.train_or_resume()
    model.config.use_cache = True  # The Trainer turns it off, and it would stay so in the folder.
    answers_after = answer(model.eval(), tokenizer, asked, recipe.answers, recipe.seed)
    if not processes().is_main_process:
        return
    write_file_whole(output / HISTORY, json.dumps(trainer.state.log_history, indent=1) + "\n")
    write_file_whole(output / ANSWERS, _as_records(asked, answers_before, answers_after, tokenizer))
    if adapted is not None:
        _write(adapted, tokenizer, output / "adapter", recipe)
        model = merge_adapters(adapted)
    _write(model, tokenizer, output / "model", recipe)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    settings: AnswerSettings,
    seed: int,
) -> list[str]:
    """What a model writes after the prompt of each example, at most as long as the longest completion."""
    answers = []
    longest = max((len(example.completion) for example in examples), default=0)
    if (room := room_beside(model.config, 1)) is not None:
        longest = min(longest, room)
    for start in range(0, len(examples), _ANSWERS_AT_ONCE):
        prompts = [example.prompt for example in examples[start : start + _ANSWERS_AT_ONCE]]
        tokens = continue_tokens(
            model,
            tokenizer,
            prompts,
            max_new_tokens=longest,
            temperature=settings.temperature,
            seed=seed,
            num_draws=settings.num_draws if settings.temperature == 0 else None,
            crop=True,
        )
        pairs = zip(prompts, tokens.tolist(), strict=True)
        answers += [decode_behind(tokenizer, prompt, new) for prompt, new in pairs]
    return answers


def exact_match(answers: list[str], examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> float:
    """Percent of the answers that are the completion, but for white space at the ends."""
    pairs = zip(answers, _wanted(examples, tokenizer), strict=True)
    right = [text.strip() == wanted.strip() for text, wanted in pairs]
    return 100 * sum(right) / len(right)


def _wanted(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [decode_behind(tokenizer, one.prompt, one.completion) for one in examples]


@torch.no_grad()
def _held_out_loss(model: PreTrainedModel, blocks: datasets.Dataset, most: int) -> float:
    """Mean loss of the targets, with the same noise each time."""
    total, count = 0.0, 0
    generator = torch.Generator(model.device).manual_seed(0)
    for block in blocks.select(range(min(most, len(blocks)))).iter(batch_size=1):
        batch = {name: block[name].to(model.device) for name in ("input_ids", "labels", "position_ids")}
        if isinstance(model, CalmForCausalLM):
            targets = int(model.count_targets(batch["labels"], batch["position_ids"]))
            loss = model(**batch, generator=generator).loss
        else:
            targets = int((batch["labels"][:, 1:] != -100).sum())
            loss = model(**batch, use_cache=False).loss
        if targets:
            total, count = total + float(loss) * targets, count + targets
    return total / max(1, count)


def _as_records(
    examples: list[Example], before: list[str], after: list[str], tokenizer: PreTrainedTokenizerBase
) -> str:
    prompts = [decode_behind(tokenizer, [], one.prompt) for one in examples]
    rows = zip(prompts, _wanted(examples, tokenizer), before, after, strict=True)
    names = ("prompt", "completion", "before", "after")
    return "".join(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)


def _write(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, recipe: FinetuningRecipe) -> None:
    if (folder / RECIPE).is_file():  # Written last.
        return
    with written_whole(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_recipe(recipe, partial / RECIPE)
