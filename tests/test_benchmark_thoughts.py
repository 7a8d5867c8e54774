"""The training FLOPs that the benchmark of thoughts reports are those of the rows that it trains on."""

import statistics
from pathlib import Path

import pytest

from calm.data.examples import read_examples
from calm.models.language_model import language_model
from calm.models.loading import load_language_model_and_tokenizer
from calm.training.finetuning_recipe import ExampleSettings, FinetuningRecipe
from calm.training.recipe import TrainingSettings
from calm.training.thinking import thinking_of

WAYS = ["cot", "drop", "no_cot", "thoughts", "pause", "at_once", "supervised", "supervised_pause"]


@pytest.fixture(scope="module")
def benchmark_of_thoughts(tmp_path_factory):
    """The module of the benchmark, and a folder with a few of its items."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        import thoughts
        import thoughts_training

        patch.setattr(thoughts_training, "NUM_ITEMS", 80)
        patch.setattr(thoughts_training, "NUM_HELD_OUT", 8)
        folder = tmp_path_factory.mktemp("benchmark")
        thoughts_training.write_items("path", folder)
        yield thoughts, folder


def cost_of_training(cell, model, tokenizer, examples):
    """Positions plus 1,000 times targets, over all rows of a cell and of the cells that it continues from."""
    if cell is None:
        return 0.0
    from thoughts_training import ROWS, settings_of, steps_of

    recipe = FinetuningRecipe(
        examples=ExampleSettings(context=128),
        thoughts=settings_of(cell),
        training=TrainingSettings(steps=steps_of(cell)),
    )
    thinking = thinking_of(recipe, model, tokenizer)
    used = [example for example in examples if cell.way != "one_hop" or len(example.steps) == 1]
    total = cost_of_training(cell.before, model, tokenizer, examples)
    for step in range(steps_of(cell)):
        if step == 0 or thinking.curriculum.begins_at(step):
            stage = thinking.curriculum.at(step)
            batches = [thinking.collate([thinking.row(example, stage)]) for example in used]
            inputs = [(batch["labels"], batch["position_ids"]) for batch in batches]
            targets = [int(language_model(model).count_targets(*pair)) for pair in inputs]
            positions = [position_ids.shape[1] for _, position_ids in inputs]
            cost_of_row = statistics.mean(positions) + 1000 * statistics.mean(targets)
        total += ROWS * cost_of_row
    return total


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "K2", "K4"])
def test_training_flops_are_those_of_the_rows(kind, way, benchmark_of_thoughts, monkeypatch):
    benchmark, folder = benchmark_of_thoughts
    from thoughts_training import Cell, new_model

    def count(_, prompt, thoughts, written, supervised=0):
        """Counts what `cost_of_training` counts, in place of FLOPs."""
        between = 0 if thoughts is None else thoughts + 2
        return prompt + between + written + 1000 * (written + supervised)

    monkeypatch.setattr(benchmark, "thinking_flops", count)
    cell = Cell("path", kind, way, 1)
    model, tokenizer = load_language_model_and_tokenizer(str(new_model(cell, folder)))
    file = str(folder / "path_held_out.jsonl")
    examples = [example for [example] in read_examples([file], tokenizer, with_steps=True)]
    expected = cost_of_training(cell, model, tokenizer, examples)
    assert benchmark.training_flops(cell, model, tokenizer, examples) == pytest.approx(expected)
