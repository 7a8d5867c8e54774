"""Do thoughts help, or is it the curriculum? Accuracy against hops, for each way of leaving out steps.

    python benchmarks/thoughts.py --output runs/thoughts --results benchmarks/results/thoughts

For each task of `calm tasks`, each kind of model and each seed, one model per way is trained on the same
questions, of one to four hops in turns, and then tested on held-out questions of each number of hops:

    cot         all steps are written
    no_cot      no step is written, from the first question on
    drop        steps are left out one after another, and nothing replaces them
    pause       the same, but each is replaced by a pause
    thoughts    the same, but each is replaced by a thought
    at_once     thoughts, but all steps are left out from the first question on
    supervised  the same, and the state before a thought must predict its step (`thoughts.supervised`)
    supervised_pause
                pauses instead of thoughts, with the same labels
    ..._longer  any of these except cot and at_once, trained three times as long: more FLOPs than any other

`cot` and `drop` continue from the same model; so do `thoughts` and `pause`, from a model that has learned the
markers of thoughts with nothing between them. At test time, the trained thoughts are also removed, swapped
with those of another question, and replaced by noise of the same size. The kinds of models are a Llama of
tokens, and CALMs with the sequential head and chunks of 1, 2 and 4 tokens; a fact has four tokens.

Finished runs and results are kept, so an interrupted benchmark resumes; runs of several seeds may share an
output folder at the same time. Without `--output`, the tables and the figure are made from existing results.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import json_rows, machine
from thoughts_table import SHOWN, draw, share, summary, table
from thoughts_training import HOPS, KINDS, ROWS, WAYS, Cell, settings_of, steps_of, train, write_text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.data.examples import Example, read_examples
from calm.data.tasks import TASKS
from calm.evaluation.answers import answer
from calm.flops import thinking_flops
from calm.models.language_model import language_model
from calm.models.loading import load_language_model_and_tokenizer
from calm.models.thoughts import thoughts_of
from calm.storage.disk import write_atomically
from calm.training.curriculum import Curriculum, ThoughtStage


@contextlib.contextmanager
def changed_thoughts(change: Callable[[Tensor, int], Tensor] | None) -> Iterator[None]:
    """Change the states that thoughts read, within a block.

    Args:
        change: The states that a thought would read, and its index in the text -> the states that it reads
            instead; None changes nothing.
    """
    if change is None:
        yield
        return
    index = itertools.count()
    with mock.patch("calm.models.thoughts.rescale", lambda states, scale: change(states, next(index))):
        yield


def noise_like(states_PD: Tensor, _: int) -> Tensor:
    """Noise of the same norm as the states."""
    noise_PD = torch.randn(states_PD.shape, generator=torch.Generator().manual_seed(0))
    return noise_PD * states_PD.norm(dim=-1, keepdim=True) / noise_PD.norm(dim=-1, keepdim=True)


def swapped(thoughts: Sequence[Tensor]) -> Callable[[Tensor, int], Tensor]:
    """A change that gives each question the thoughts of the previous question in the batch."""
    return lambda states_PD, index: thoughts[index].roll(1, 0)


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_tokens: int
) -> list[str]:
    """Greedy answers, all in one batch."""
    return answer(model, tokenizer, examples, temperature=0.0, num_draws=1, seed=0, max_new_tokens=max_tokens)


def is_right(answers: Sequence[str], records: Sequence[dict[str, Any]]) -> str:
    """A string with 1 for each answer that ends with the right word, and 0 for the others."""
    pairs = zip(answers, records, strict=True)
    return "".join(str(int(text.split()[-1:] == record["completion"].split())) for text, record in pairs)


def measure(cell: Cell, folder: Path, output: Path) -> dict[str, Any]:
    """Answers of a trained model to the held-out questions by hops, and the cost of an answer."""
    model, tokenizer = load_language_model_and_tokenizer(str(folder / "model"))
    file = output / f"{cell.task}_held_out.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    examples = [example for [example] in read_examples([str(file)], tokenizer, with_steps=True)]
    size, thoughts = language_model(model).chunk_size, thoughts_of(model.config)
    num_thoughts = 0 if thoughts is None else thoughts.number
    left_out = 0 if cell.way in ("one_hop", "steps", "marked_steps", "cot") else max(HOPS[cell.task])

    def chunks(tokens: Sequence[int]) -> int:
        return -(-len(tokens) // size)

    def written(example: Example) -> int:
        return sum(map(chunks, (*example.steps[left_out:], example.completion)))

    longest = max(map(written, examples)) * size
    by_hops: dict[str, Any] = {}
    for hops in HOPS[cell.task]:
        indices = [index for index, record in enumerate(records) if record["hops"] == hops]
        questions, solutions = [examples[index] for index in indices], [records[index] for index in indices]
        recorded: list[Tensor] = []

        def record_states(states_PD: Tensor, _: int, recorded: list[Tensor] = recorded) -> Tensor:
            recorded.append(states_PD)
            return states_PD

        changes: dict[str, Callable[[Tensor, int], Tensor] | None] = {"as trained": None}
        if cell.way.removesuffix("_longer") in ("thoughts", "at_once", "supervised"):
            changes |= {"recorded": record_states, "swapped": swapped(recorded), "noise": noise_like}
        answers = {}
        with mock.patch("calm.evaluation.answers._ANSWERS_AT_ONCE", len(questions)):
            for name, change in changes.items():
                with changed_thoughts(change):
                    answers[name] = is_right(ask(model, tokenizer, questions, longest), solutions)
            if thoughts is not None:  # The markers stay, with nothing between them.
                with mock.patch.dict(model.config.thoughts, {"number": 0}):
                    answers["removed"] = is_right(ask(model, tokenizer, questions, longest), solutions)
        answers.pop("recorded", None)
        sizes = [(chunks(question.prompt), written(question)) for question in questions]
        markers = 0 if thoughts is None else 2
        by_hops[str(hops)] = {
            "answers": answers,
            "written_tokens": statistics.mean(size * steps for _, steps in sizes),
            "backbone_steps": statistics.mean(1 + num_thoughts + steps - 1 for _, steps in sizes),
            "positions": statistics.mean(prompt + markers + num_thoughts + steps for prompt, steps in sizes),
            "head_draws": statistics.mean(steps for _, steps in sizes)
            if size > 1 or cell.kind == "K1"
            else 0,
        }
    return {
        **dataclasses.asdict(cell),
        "parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "thoughts": num_thoughts,
        "hops": by_hops,
        "training_flops": training_flops(cell, model, tokenizer, examples),
    }


def training_flops(
    cell: Cell, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> float:
    """FLOPs of training a model, including those of the models that it continues from."""
    size = language_model(model).chunk_size
    settings = settings_of(cell)
    steps = steps_of(cell)
    if cell.way == "one_hop":
        examples = [example for example in examples if len(example.steps) == 1]
    curriculum, total = Curriculum.of(settings, steps), 0.0

    def flops_of(example: Example, stage: ThoughtStage) -> float:
        def chunks(tokens: Sequence[int]) -> int:
            return -(-len(tokens) // size)

        written = sum(map(chunks, (*example.steps[stage.left_out :], example.completion)))
        replaced = example.steps[: stage.thoughts // settings.per_step] if settings.supervised else ()
        labels = sum(min(settings.per_step, chunks(step)) for step in replaced)
        thoughts = None if settings.mode == "drop" else stage.thoughts
        return thinking_flops(model.config, chunks(example.prompt), thoughts, written, labels)

    ends = [*curriculum.starts[1:], steps]
    for stage, start, end in zip(curriculum.stages, curriculum.starts, ends, strict=True):
        flops = [flops_of(example, stage) for example in examples[:200]]
        total += (end - start) * ROWS * statistics.mean(flops)
    before = cell.before
    return total + (0.0 if before is None else training_flops(before, model, tokenizer, examples))


def main() -> None:
    """Train and test whatever is missing; print the tables and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--ways", nargs="*", default=list(SHOWN), choices=WAYS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results/thoughts")
    parser.add_argument("--figure", type=Path, help="where the figure is drawn, a PNG")
    arguments = parser.parse_args()
    order = itertools.product(arguments.seeds, arguments.tasks, arguments.kinds, arguments.ways)
    for seed, task, kind, way in order if arguments.output else ():
        cell, output = Cell(task, kind, way, seed), arguments.output
        file = arguments.results / f"{cell.name}.json"
        if file.exists():
            continue
        write_text(cell, output)
        start = time.monotonic()
        folder = train(cell, output)
        row = measure(cell, folder, output)
        row |= {"seconds": round(time.monotonic() - start), "machine": machine()}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json_rows(row) + "\n")
        shares = {hops: share(result["answers"]["as trained"]) for hops, result in row["hops"].items()}
        print(cell.name, shares)

    rows = [json.loads(file.read_text()) for file in sorted(arguments.results.glob("*.json"))]
    for task in arguments.tasks:
        of_task = [row for row in rows if row["task"] == task and row["kind"] in arguments.kinds]
        for kind in arguments.kinds:
            if chosen := [row for row in of_task if row["kind"] == kind]:
                print(f"\n{task}, {kind}\n\n{table(chosen)}")
        if of_task:
            print(f"\n{task}, all\n\n{summary(of_task)}")
    if arguments.figure:
        draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
