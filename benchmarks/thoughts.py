"""Do thoughts help, or is it the curriculum? Accuracy against hops, for each way of leaving steps out.

    python benchmarks/thoughts.py --output runs/thoughts --results benchmarks/results/thoughts

For each task of `calm tasks`, each kind of model and each seed, one model is trained in each way on the same
items, questions of one to four hops in turns, and asked held-out questions of each number of hops:

    cot         all steps are written
    no_cot      none is, from the first item on
    drop        step after step is left out, and nothing is in its place
    pause       as many pauses are in its place
    thoughts    as many thoughts are
    at_once     thoughts, but all steps are left out from the first item on
    supervised  the same, and the state before a thought must predict its step (`thoughts.supervised`)
    supervised_pause
                pauses instead, with the same labels
    ..._longer  any of these but cot and at_once, three times as long: more FLOPs than any other

`cot` begins with steps of training that `drop` goes on from; `thoughts` and `pause` share theirs, in which
the markers are there and nothing between them. The trained thoughts are then removed, given to another
question, and replaced by noise of the same size. Kinds of models are a Llama of tokens, and CALMs with the
sequential head and chunks of 1, 2 and 4 tokens; a fact is four tokens.

What is finished is kept, so the benchmark goes on where it was stopped; runs of several seeds may share an
output folder at the same time. Without `--output` the table and the figure are drawn from the results alone.
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
from calm.storage.disk import write_file_whole
from calm.training.curriculum import Curriculum, Stage


@contextlib.contextmanager
def changed_thoughts(change: Callable[[Tensor, int], Tensor] | None) -> Iterator[None]:
    """Within, what a thought reads is changed: (what it would read, which thought of the text it is)."""
    if change is None:
        yield
        return
    number = itertools.count()
    with mock.patch("calm.models.thoughts.scaled", lambda states, scale: change(states, next(number))):
        yield


def noise_like(states_PD: Tensor, _: int) -> Tensor:
    """Noise of the same size."""
    noise_PD = torch.randn(states_PD.shape, generator=torch.Generator().manual_seed(0))
    return noise_PD * states_PD.norm(dim=-1, keepdim=True) / noise_PD.norm(dim=-1, keepdim=True)


def swapped(thoughts: Sequence[Tensor]) -> Callable[[Tensor, int], Tensor]:
    """What the next question of the batch thought at the same place."""
    return lambda states_PD, number: thoughts[number].roll(1, 0)


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], written: int
) -> list[str]:
    """Greedy answers, all in one batch."""
    return answer(model, tokenizer, examples, temperature=0.0, num_draws=1, seed=0, max_new_tokens=written)


def is_right(answers: Sequence[str], records: Sequence[dict[str, Any]]) -> str:
    """1 for every answer that ends with the right word, 0 for the others."""
    pairs = zip(answers, records, strict=True)
    return "".join(str(int(text.split()[-1:] == one["completion"].split())) for text, one in pairs)


def measure(cell: Cell, folder: Path, output: Path) -> dict[str, Any]:
    """Answers of a trained model to the held-out questions, by hops, and what an answer takes."""
    model, tokenizer = load_language_model_and_tokenizer(str(folder / "model"))
    file = output / f"{cell.task}_held_out.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    examples = [one for [one] in read_examples([str(file)], tokenizer, with_steps=True)]
    size, thoughts = language_model(model).chunk_size, thoughts_of(model.config)
    number = 0 if thoughts is None else thoughts.number
    left_out = 0 if cell.way in ("one_hop", "steps", "marked_steps", "cot") else max(HOPS[cell.task])

    def chunks(tokens: Sequence[int]) -> int:
        return -(-len(tokens) // size)

    def written(one: Example) -> int:
        return sum(map(chunks, (*one.steps[left_out:], one.completion)))

    longest = max(map(written, examples)) * size
    by_hops: dict[str, Any] = {}
    for hops in HOPS[cell.task]:
        places = [place for place, record in enumerate(records) if record["hops"] == hops]
        asked, told = [examples[place] for place in places], [records[place] for place in places]
        kept: list[Tensor] = []

        def keep(states_PD: Tensor, _: int, kept: list[Tensor] = kept) -> Tensor:
            kept.append(states_PD)
            return states_PD

        changes: dict[str, Callable[[Tensor, int], Tensor] | None] = {"as trained": None}
        if cell.way.removesuffix("_longer") in ("thoughts", "at_once", "supervised"):
            changes |= {"kept": keep, "swapped": swapped(kept), "noise": noise_like}
        answers = {}
        with mock.patch("calm.evaluation.answers._ANSWERS_AT_ONCE", len(asked)):
            for name, change in changes.items():
                with changed_thoughts(change):
                    answers[name] = is_right(ask(model, tokenizer, asked, longest), told)
            if thoughts is not None:  # The markers stay, with nothing between them.
                with mock.patch.dict(model.config.thoughts, {"number": 0}):
                    answers["removed"] = is_right(ask(model, tokenizer, asked, longest), told)
        answers.pop("kept", None)
        rows = [(chunks(one.prompt), written(one)) for one in asked]
        markers = 0 if thoughts is None else 2
        by_hops[str(hops)] = {
            "answers": answers,
            "written_tokens": statistics.mean(size * steps for _, steps in rows),
            "backbone_steps": statistics.mean(1 + number + steps - 1 for _, steps in rows),
            "positions": statistics.mean(prompt + markers + number + steps for prompt, steps in rows),
            "head_draws": statistics.mean(steps for _, steps in rows) if size > 1 or cell.kind == "K1" else 0,
        }
    return {
        **dataclasses.asdict(cell),
        "parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "thoughts": number,
        "hops": by_hops,
        "training_flops": training_flops(cell, model, tokenizer, examples),
    }


def training_flops(
    cell: Cell, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> float:
    """FLOPs of the training of a model, that of the one that it begins with included."""
    size = language_model(model).chunk_size
    settings = settings_of(cell)
    steps = steps_of(cell)
    if cell.way == "one_hop":
        examples = [one for one in examples if len(one.steps) == 1]
    curriculum, total = Curriculum.of(settings, steps), 0.0

    def flops_of(one: Example, stage: Stage) -> float:
        def chunks(tokens: Sequence[int]) -> int:
            return -(-len(tokens) // size)

        written = sum(map(chunks, (*one.steps[stage.left_out :], one.completion)))
        replaced = one.steps[: stage.thoughts // settings.per_step] if settings.supervised else ()
        labels = sum(min(settings.per_step, chunks(step)) for step in replaced)
        thoughts = None if settings.mode == "drop" else stage.thoughts
        return thinking_flops(model.config, chunks(one.prompt), thoughts, written, labels)

    ends = [*curriculum.starts[1:], steps]
    for stage, start, end in zip(curriculum.stages, curriculum.starts, ends, strict=True):
        flops = [flops_of(one, stage) for one in examples[:200]]
        total += (end - start) * ROWS * statistics.mean(flops)
    before = cell.before
    return total + (0.0 if before is None else training_flops(before, model, tokenizer, examples))


def main() -> None:
    """Train and ask what is missing; print the table and draw the figure."""
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
        begun = time.monotonic()
        folder = train(cell, output)
        row = measure(cell, folder, output)
        row |= {"seconds": round(time.monotonic() - begun), "machine": machine()}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file_whole(file, json_rows(row) + "\n")
        print(cell.name, {hops: share(one["answers"]["as trained"]) for hops, one in row["hops"].items()})

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
