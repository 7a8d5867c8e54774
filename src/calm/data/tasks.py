"""Endless questions that take several steps to answer, and have no shortcuts.

Three tasks, small enough to learn on two CPU cores, for models that reason: in words, or in continuous
thoughts (Hao et al., arXiv 2412.06769, whose own questions about graphs, ProsQA, can partly be guessed from
how often a node is named). Each fact, step and question is four words, so chunks of one, two and four tokens
align with them if the tokenizer has a token for each word.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from calm.core.seeds import as_seed
from calm.errors import InputError
from calm.ranges import Range
from calm.storage.disk import disk_errors, write_lines_atomically

MODULUS = 7
_NUM_PATHS = 4
_HELD_OUT = 16  # One group of facts in 16 is held out for scoring, whatever the seed.


@dataclass(frozen=True)
class Item:
    """A question.

    Args:
        facts: What is given, in random order.
        question: What is asked.
        steps: The steps to the answer, one hop each.
        answer: The answer, one word.
    """

    facts: tuple[str, ...]
    question: str
    steps: tuple[str, ...]
    answer: str

    @property
    def record(self) -> dict[str, Any]:
        """The record that `calm finetune` reads, with steps and number of hops."""
        return {
            "prompt": " ".join([*self.facts, self.question]),
            "steps": list(self.steps),
            "completion": f" {self.answer}",
            "hops": len(self.steps),
        }


def chain(rng: random.Random, hops: int) -> list[Item]:
    """Ask for the value of a variable modulo 7, at the end of a chain of products and sums.

    `a = 5 .` starts a chain, `b a * 3` and `b a + 3` continue it. The facts of a second chain of the same
    kind are mixed in. The question names both ends of the chain, so each step means looking up a single fact,
    and the answer takes one step per hop, in sequence. At least one hop adds a number uniform over 0 to 6:
    without its fact, all seven answers are equally likely, so chance is 1/7. (Without a factor, which is 2 to
    6, they are not quite equally likely.)

    Args:
        rng: Source of randomness.
        hops: Facts between the known value and the one asked for.
    """
    names = iter(rng.sample(ascii_lowercase, 2 * (hops + 1)))
    (facts, values), (distractors, _) = (
        _chain(rng, [next(names) for _ in range(hops + 1)]) for _ in range(2)
    )
    facts += distractors
    rng.shuffle(facts)
    steps = tuple(f"{name} = {value} ." for name, value in values[1:])
    return [Item(tuple(facts), f"{values[0][0]} ? {values[-1][0]} :", steps, str(values[-1][1]))]


def _chain(rng: random.Random, names: list[str]) -> tuple[list[str], list[tuple[str, int]]]:
    """The facts, and the value of each name."""
    hops = len(names) - 1
    adds = {rng.randrange(hops)} | {hop for hop in range(hops) if rng.random() < 0.5}
    value = rng.randrange(MODULUS)
    facts, values = [f"{names[0]} = {value} ."], [(names[0], value)]
    for hop, (before, name) in enumerate(itertools.pairwise(names)):
        number = rng.randrange(MODULUS) if hop in adds else rng.randrange(2, MODULUS)
        value = (value + number if hop in adds else value * number) % MODULUS
        facts.append(f"{name} {before} {'+' if hop in adds else '*'} {number}")
        values.append((name, value))
    return facts, values


def graph(rng: random.Random, hops: int) -> list[Item]:
    """Ask which of two nodes can be reached from a root: two items, one for each root of the same graph.

    `a > b .` is an edge. The graph has two halves that are identical up to names, each with a root and a
    target node `hops` edges away from it. Both roots are asked about the same two targets, so a strategy that
    ignores the root is right once and wrong once: chance is exactly 1/2.

    Args:
        rng: Source of randomness.
        hops: Edges between the root and its target.
    """
    size = rng.randint(max(4, hops + 2), max(8, hops + 2))
    edges = _half_edges(rng, hops, size)
    names = rng.sample(ascii_lowercase, 2 * size)
    halves = names[:size], names[size:]
    facts = [f"{half[start]} > {half[end]} ." for half in halves for start, end in edges]
    rng.shuffle(facts)
    targets = [half[hops] for half in halves]
    rng.shuffle(targets)
    items = []
    for half in halves:
        steps = tuple(f"{half[hop]} > {half[hop + 1]} ." for hop in range(hops))
        items.append(Item(tuple(facts), f"{half[0]} ? {targets[0]} {targets[1]}", steps, half[hops]))
    rng.shuffle(items)
    return items


def _half_edges(rng: random.Random, hops: int, size: int) -> list[tuple[int, int]]:
    """Edges of a half: the path from 0 to `hops`, and other nodes attached to it and to each other."""
    edges = {(hop, hop + 1) for hop in range(hops)}
    for node in range(hops + 1, size):
        edges.add((rng.randrange(node), node))
    for _ in range(rng.randint(0, 2)):  # Only to nodes off the path, so none is a shortcut to its end.
        start, end = sorted(rng.sample(range(size), 2))
        if end > hops:
            edges.add((start, end))
    return sorted(edges)


def path(rng: random.Random, hops: int) -> list[Item]:
    """Ask where a path ends: one item for each of four paths of the same length.

    `a > b .` is a step of a path; no two paths meet. A strategy that ignores the start of the path is right
    once in four times: chance is exactly 1/4.

    Args:
        rng: Source of randomness.
        hops: Steps of each path.
    """
    names = rng.sample(ascii_lowercase, _NUM_PATHS * (hops + 1))
    paths = [names[first : first + hops + 1] for first in range(0, len(names), hops + 1)]
    steps = [tuple(f"{start} > {end} ." for start, end in itertools.pairwise(nodes)) for nodes in paths]
    facts = [step for steps_of_path in steps for step in steps_of_path]
    rng.shuffle(facts)
    return [
        Item(tuple(facts), f"{nodes[0]} > ? :", steps_of_path, nodes[-1])
        for nodes, steps_of_path in zip(paths, steps, strict=True)
    ]


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Args:
        make: Generates a group of items that share their facts.
        hops: How many steps an item may take.
    """

    make: Callable[[random.Random, int], list[Item]]
    hops: Range


TASKS = {
    "chain": Task(chain, Range(1, 12)),
    "graph": Task(graph, Range(1, 11)),
    "path": Task(path, Range(1, 5)),
}


def items(
    name: str, hops: int, seed: int = 0, number: int | None = None, held_out: bool = False
) -> Iterator[Item]:
    """Generate items.

    Args:
        name: "chain", "graph" or "path".
        hops: Steps to the answer.
        seed: Seed of the sequence, which is the same on every machine and Python version.
        number: How many; None for an endless sequence.
        held_out: Whether to generate the items held out for scoring. Their facts, in whatever order, never
            occur together in the other items, whatever the seed.

    Raises:
        InputError: If there is no such task, or it does not allow that many hops.
    """
    if name not in TASKS:
        raise InputError(f"there is no task '{name}'; use one of: {', '.join(TASKS)}.")
    TASKS[name].hops.require("hops", hops)
    return itertools.islice(_items(name, hops, as_seed(seed), held_out), number)


def _items(name: str, hops: int, seed: int, held_out: bool) -> Iterator[Item]:
    for attempt in itertools.count():
        group = TASKS[name].make(random.Random(f"{name}/{hops}/{seed}/{attempt}"), hops)
        if _is_held_out(group[0].facts) == held_out:
            yield from group


def _is_held_out(facts: tuple[str, ...]) -> bool:
    digest = hashlib.sha256("\n".join(sorted(facts)).encode()).digest()
    return digest[0] % _HELD_OUT == 0


def write_items(path: Path, name: str, hops: int, seed: int, number: int, held_out: bool) -> None:
    """Write items to a JSON Lines file, whole or not at all."""
    lines = (json.dumps(item.record) + "\n" for item in items(name, hops, seed, number, held_out))
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        write_lines_atomically(path, lines)
