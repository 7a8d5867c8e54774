"""Synthetic questions: answers follow from the facts, and no shortcut finds them."""

import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
from toy import failure

from calm.cli import main
from calm.data.tasks import MODULUS, TASKS, items, write_items
from calm.errors import InputError

HOPS = [1, 2, 3, 5, 8]


def value_of(facts, name):
    """The value of a name in a chain, by following its facts back to the root."""
    for fact in facts:
        words = fact.split()
        if words[0] == name:
            if words[1] == "=":
                return int(words[2])
            before, number = value_of(facts, words[1]), int(words[3])
            return (before * number if words[2] == "*" else before + number) % MODULUS
    raise KeyError(name)


def distances(facts, root):
    """Edges to each node that can be reached, breadth first."""
    edges = [(fact[0], fact[4]) for fact in facts]
    distance, frontier = {root: 0}, [root]
    while frontier:
        frontier = [end for start, end in edges if start in frontier and end not in distance]
        distance |= {end: max(distance.values()) + 1 for end in frontier}
    return distance


@pytest.mark.parametrize("hops", HOPS)
def test_chain_answers_follow_from_the_facts(hops):
    answers = Counter()
    for item in items("chain", hops, number=400):
        first, _, name, _ = item.question.split()
        assert f"{first} = {value_of(item.facts, first)} ." in item.facts
        assert int(item.answer) == value_of(item.facts, name)
        assert len(item.steps) == hops and len(item.facts) == 2 * (hops + 1)
        for step in item.steps:
            variable, _, value, _ = step.split()
            assert value_of(item.facts, variable) == int(value)
        assert item.steps[-1].split()[0] == name
        answers[item.answer] += 1
    expected = 400 / MODULUS
    assert sum((answers[str(n)] - expected) ** 2 / expected for n in range(MODULUS)) < 22.5  # p = 0.001


@pytest.mark.parametrize("hops", HOPS)
def test_graph_answers_follow_from_the_facts(hops):
    for pair in zip(*[items("graph", hops, number=400)] * 2, strict=True):
        first, second = pair
        assert first.facts == second.facts and first.question[2:] == second.question[2:]
        # The other root has the other answer.
        assert {first.answer, second.answer} == set(first.question[4:].split())
        for item in pair:
            distance = distances(item.facts, item.question[0])
            (unreached,) = set(item.question[4:].split()) - {item.answer}
            assert distance[item.answer] == hops == len(item.steps) and unreached not in distance
            assert set(item.steps) <= set(item.facts)
            path = [item.steps[0][0], *(step[4] for step in item.steps)]
            assert path[0] == item.question[0] and path[-1] == item.answer
            assert all(a[4] == b[0] for a, b in itertools.pairwise(item.steps))


@pytest.mark.parametrize("hops", [1, 3, 5])
def test_path_answers_follow_from_the_facts(hops):
    for group in zip(*[items("path", hops, number=400)] * 4, strict=True):
        assert len({item.facts for item in group}) == 1 and len(group[0].facts) == 4 * hops
        assert len({item.answer for item in group}) == 4  # Each start has an end of its own.
        for item in group:
            distance = distances(item.facts, item.question[0])
            assert distance == dict(
                zip([item.question[0], *(s[4] for s in item.steps)], range(hops + 1), strict=True)
            )
            assert item.answer == item.steps[-1][4] and len(item.steps) == hops


def test_no_shortcut_through_paths():
    """A rule that ignores where a path starts is right for exactly one question in four."""
    right = Counter()
    for item in items("path", 3, seed=1, number=1000):
        ends = [
            node
            for node in re.findall(r"> (.) [.]", " ".join(item.facts))
            if f"{node} >" not in " ".join(item.facts)
        ]
        assert len(ends) == 4
        for rule, guess in {"first": ends[0], "last": ends[-1], "least": min(ends)}.items():
            right[rule] += guess == item.answer
    assert set(right.values()) == {250}


@pytest.mark.parametrize("name", TASKS)
def test_facts_steps_and_questions_have_four_words(name):
    for item in items(name, 3, number=100):
        for part in (*item.facts, *item.steps, item.question):
            assert re.fullmatch(r"\S( \S){3}", part)


def chain_rules(item):
    """Guesses that do not compute the values along the chain."""
    fact_asked_for = next(fact.split() for fact in item.facts if fact.split()[0] == item.question.split()[2])
    roots = [fact.split()[2] for fact in item.facts if " = " in fact]
    numbers = Counter(fact.split()[-1] for fact in item.facts if " = " not in fact)
    return {
        "number of the asked": fact_asked_for[3],
        "first root": roots[0],
        "last root": roots[-1],
        "most frequent": numbers.most_common(1)[0][0],
        "most frequent of all": Counter(re.findall(r"\d", " ".join(item.facts))).most_common(1)[0][0],
        "own root": next(f for f in item.facts if " = " in f and f[0] == chain_root(item)).split()[2],
    }


def chain_root(item):
    name = item.question.split()[2]
    while True:
        words = next(fact.split() for fact in item.facts if fact.split()[0] == name)
        if words[1] == "=":
            return name
        name = words[1]


@pytest.mark.parametrize("hops", [2, 3, 6])
def test_no_shortcut_through_chains(hops):
    right, number = Counter(), 4000
    for item in items("chain", hops, seed=1, number=number):
        for rule, guess in chain_rules(item).items():
            right[rule] += guess == item.answer
    error = (MODULUS - 1) ** 0.5 / MODULUS / number**0.5
    for rule, count in right.items():
        assert count / number < 1 / MODULUS + 4 * error, rule


@pytest.mark.parametrize("hops", [2, 3, 4])
def test_no_shortcut_through_graphs(hops):
    """Rules that ignore the root are right exactly half of the time."""
    right, number = Counter(), 1000
    for item in items("graph", hops, seed=1, number=number):
        text, targets = " ".join(item.facts), item.question[4:].split()
        rules = {
            "more mentions": max(targets, key=text.count),
            "fewer mentions": min(targets, key=text.count),
            "named first": min(targets, key=text.index),
            "first in the question": targets[0],
            "more edges out": max(targets, key=lambda node: text.count(f"{node} >")),
        }
        for rule, guess in rules.items():
            right[rule] += guess == item.answer
    assert set(right.values()) == {number // 2}


@pytest.mark.parametrize("name", TASKS)
def test_no_shortcut_through_the_order_of_facts(name):
    """The fact of a hop may be anywhere, and comes before that of the next hop as often as after it."""
    signs = []
    for item in itertools.islice(items(name, 3, seed=1), 0, 8000, 4):  # One of each group, so independent.
        indices = [
            next(
                index
                for index, fact in enumerate(item.facts)
                if (fact == step if name != "chain" else fact[0] == step[0])
            )
            for step in item.steps
        ]
        middle = (len(item.facts) - 1) / 2
        signs.append([np.sign(index - middle) for index in indices] + list(np.sign(np.diff(indices))))
    error = np.std(signs, axis=0) / len(signs) ** 0.5
    assert (np.abs(np.mean(signs, axis=0)) < 4 * error).all()


@pytest.mark.parametrize("name", TASKS)
def test_what_is_held_out_is_never_trained_on(name):
    def facts(seed, held_out, number):
        return {frozenset(item.facts) for item in items(name, 1, seed, number, held_out)}

    held_out = set.union(*(facts(seed, True, 500) for seed in range(3)))
    assert not held_out & set.union(*(facts(seed, False, 3000) for seed in range(3)))


def test_the_same_seed_gives_the_same_items():
    assert list(items("chain", 3, 5, 20)) == list(items("chain", 3, 5, 40))[:20]
    assert not set(items("chain", 3, 5, 20)) & set(items("chain", 3, 6, 20))
    assert next(items("graph", 2, 5)).record == {
        "prompt": next(items("graph", 2, 5)).record["prompt"],
        "steps": list(next(items("graph", 2, 5)).steps),
        "completion": f" {next(items('graph', 2, 5)).answer}",
        "hops": 2,
    }


@pytest.mark.parametrize(("name", "hops"), [("chain", 13), ("chain", 0), ("graph", 12), ("path", 6)])
def test_unsupported_numbers_of_hops_are_refused(name, hops):
    with pytest.raises(InputError, match="hops"):
        items(name, hops)


@pytest.mark.parametrize("name", TASKS)
def test_largest_number_of_hops_has_enough_names(name):
    most = int(TASKS[name].hops.high)
    assert len(next(items(name, most)).steps) == most


def test_tasks_command(tmp_path, capsys):
    file = tmp_path / "new" / "chain.jsonl"
    main(["tasks", "chain", "--hops", "3", "--number", "12", "--seed", "4", "--output", str(file)])
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert records == [item.record for item in items("chain", 3, 4, 12)]
    assert f"12 items: {file}" in capsys.readouterr().out
    held_out = tmp_path / "held_out.jsonl"
    main(["tasks", "chain", "--hops", "3", "--number", "5", "--held_out", "--output", str(held_out)])
    assert len(held_out.read_text().splitlines()) == 5


def test_items_are_written_one_by_one_and_atomically(tmp_path, monkeypatch):
    """Not collected in memory first, and without touching other files."""
    file, neighbor = tmp_path / "chain.jsonl", tmp_path / "chain.partial"
    file.write_text("old")
    neighbor.write_text("mine")
    made = 0

    def endless(*_):
        nonlocal made
        for item in items("chain", 3):
            made += 1
            if made == 2000:
                [partial] = tmp_path.glob(".*")
                assert partial.stat().st_size > 1000 and file.read_text() == "old"
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patched:
        patched.setattr("calm.data.tasks.items", endless)
        with pytest.raises(KeyboardInterrupt):
            write_items(file, "chain", 3, 0, 10**8, False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "chain.jsonl": "old",
        "chain.partial": "mine",
    }
    write_items(file, "chain", 3, 0, 5, False)
    assert len(file.read_text().splitlines()) == 5 and neighbor.read_text() == "mine"


def test_invalid_commands_are_refused(tmp_path, capsys):
    file = tmp_path / "chain.jsonl"
    command = ["tasks", "chain", "--hops", "3", "--number", "2", "--output", str(file)]
    file.write_text("mine")
    assert "exists; choose another --output or pass --overwrite" in failure(capsys, *command)
    assert file.read_text() == "mine"
    main([*command, "--overwrite"])
    assert file.read_text() != "mine"
    assert "number must be at least 1" in failure(capsys, *command, "--overwrite", "--number", "0")
    assert "hops" in failure(capsys, *command, "--overwrite", "--hops", "99")
    assert "no task 'tree'; use one of: chain, graph, path" in failure(
        capsys, "tasks", "tree", *command[2:], "--overwrite"
    )
    assert file.read_text().startswith('{"prompt": ')
    assert "is a folder" in failure(capsys, *command[:-1], str(tmp_path), "--overwrite")
    for name in ("chain.jsonl.gz", "chain.txt", "chain"):  # Which calm finetune would not read.
        message = failure(capsys, *command[:-1], str(tmp_path / name))
        assert f"the output must be a .jsonl file, got '{tmp_path / name}'" in message
        assert not (tmp_path / name).exists()


def test_seed_may_be_a_numpy_integer_but_not_a_bool_or_float():
    first = list(items("path", 2, seed=1, number=3))
    assert list(items("path", 2, seed=np.int64(1), number=3)) == first
    for seed in (True, 1.0, "1"):
        with pytest.raises(ValueError, match="a seed must be a whole number"):
            items("path", 2, seed=seed, number=3)
