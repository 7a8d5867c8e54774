"""Which steps are left out when, and by what chance."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from calm.errors import InputError
from calm.training.curriculum import Curriculum
from calm.training.finetuning_recipe import ThoughtSettings
from calm.training.thinking import ThinkingRows


def curriculum(total=100, **settings):
    return Curriculum.of(ThoughtSettings(**{"mode": "state", "steps_per_stage": 20} | settings), total)


def plan(made):
    return [(stage.number, stage.left_out, stage.thoughts) for stage in made.stages]


def test_stages_and_their_thoughts():
    made = curriculum(stages=3, per_step=2)
    assert plan(made) == [(0, 0, 0), (1, 1, 2), (2, 2, 4), (3, 3, 6)]
    assert made.starts == (0, 20, 40, 60)
    assert [made.at(step).number for step in (0, 19, 20, 59, 60, 99)] == [0, 0, 1, 2, 3, 3]
    assert [step for step in range(100) if made.begins_at(step)] == [20, 40, 60]


def test_a_last_stage_without_steps():
    made = curriculum(stages=2, drop_rest=True, steps_per_stage=[30, 10, 5])
    assert plan(made)[:3] == [(0, 0, 0), (1, 1, 1), (2, 2, 2)]
    assert made.stages[3].left_out > 10**6 and made.stages[3].thoughts == 2
    assert made.starts == (0, 30, 40, 45)


def test_without_a_curriculum():
    made = curriculum(stages=3, first_stage=3)
    assert plan(made) == [(3, 3, 3)] and made.starts == (0,)
    assert not any(made.begins_at(step) for step in range(100))


def test_dropped_steps_have_no_thoughts():
    assert plan(curriculum(mode="drop", stages=2)) == [(0, 0, 0), (1, 1, 0), (2, 2, 0)]
    assert plan(curriculum(mode="pause", stages=1)) == [(0, 0, 0), (1, 1, 1)]
    assert plan(curriculum(mode="drop", stages=0)) == [(0, 0, 0)]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"first_stage": 4}, "first_stage must be at most"),
        ({"steps_per_stage": 40}, "would begin at step 120 of 100"),
        ({"steps_per_stage": [10, 10]}, "must list the steps of 3 stages"),
        ({"steps_per_stage": [10, 0, 10]}, "each at least 1"),
    ],
)
def test_what_contradicts_itself(settings, word):
    with pytest.raises(InputError, match=word):
        curriculum(**settings)


def test_mixing_takes_earlier_stages_only():
    """A chi-square test against the distribution that the recipe says."""
    made = curriculum(stages=3, mix=0.3)
    for step in range(20):
        assert all(made.of_item(step, 1, place).number == 0 for place in range(50))
    counts = Counter(made.of_item(70, 1, place).number for place in range(20_000))
    expected = {3: 14_000, 0: 2_000, 1: 2_000, 2: 2_000}
    assert counts.keys() == expected.keys()
    assert sum((counts[n] - e) ** 2 / e for n, e in expected.items()) < 16.3  # p = 0.001


def test_mixing_is_a_matter_of_seed_and_place():
    made = curriculum(stages=3, mix=0.5)
    first = [made.of_item(70, 1, place).number for place in range(200)]
    assert first == [made.of_item(70, 1, place).number for place in range(200)]
    assert first != [made.of_item(70, 2, place).number for place in range(200)]
    assert first != [made.of_item(71, 1, place).number for place in range(200)]


def test_rows_are_in_a_random_order_of_each_epoch():
    """Each depends only on its place and the seed, and has the stage of its step."""
    made = curriculum(stages=3, mix=0.5)
    thinking: Any = SimpleNamespace(curriculum=made, row=lambda example, stage: (example, stage))

    def rows(seed):
        made_rows = ThinkingRows(thinking, range(30), rows_per_step=4, steps=100, seed=seed)
        assert len(made_rows) == 400
        backwards = [made_rows[place] for place in reversed(range(400))]
        assert [made_rows[place] for place in range(400)] == backwards[::-1]
        return backwards[::-1]

    order = [example for example, _ in rows(1)]
    epochs = [tuple(order[first : first + 30]) for first in range(0, 390, 30)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs) and len(set(epochs)) == 13
    assert [stage for _, stage in rows(1)] == [made.of_item(n // 4, 1, n % 4) for n in range(400)]
    assert order != [example for example, _ in rows(2)]
