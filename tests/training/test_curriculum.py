"""Which reasoning steps each stage leaves out, and how often rows of earlier stages are mixed in."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from calm.errors import InputError
from calm.training.curriculum import Curriculum
from calm.training.finetuning_recipe import ThoughtSettings
from calm.training.thinking import ThinkingRows


def make_curriculum(total=100, **settings):
    return Curriculum.of(ThoughtSettings(**{"mode": "state", "steps_per_stage": 20} | settings), total)


def plan(curriculum):
    return [(stage.number, stage.left_out, stage.thoughts) for stage in curriculum.stages]


def test_each_stage_replaces_one_more_step_by_thoughts():
    curriculum = make_curriculum(stages=3, per_step=2)
    assert plan(curriculum) == [(0, 0, 0), (1, 1, 2), (2, 2, 4), (3, 3, 6)]
    assert curriculum.starts == (0, 20, 40, 60)
    assert [curriculum.at(step).number for step in (0, 19, 20, 59, 60, 99)] == [0, 0, 1, 2, 3, 3]
    assert [step for step in range(100) if curriculum.begins_at(step)] == [20, 40, 60]


def test_drop_rest_adds_a_stage_that_leaves_out_every_step():
    curriculum = make_curriculum(stages=2, drop_rest=True, steps_per_stage=[30, 10, 5])
    assert plan(curriculum)[:3] == [(0, 0, 0), (1, 1, 1), (2, 2, 2)]
    assert curriculum.stages[3].left_out > 10**6 and curriculum.stages[3].thoughts == 2
    assert curriculum.starts == (0, 30, 40, 45)


def test_first_stage_may_be_the_only_one():
    curriculum = make_curriculum(stages=3, first_stage=3)
    assert plan(curriculum) == [(3, 3, 3)] and curriculum.starts == (0,)
    assert not any(curriculum.begins_at(step) for step in range(100))


def test_only_mode_drop_has_no_thoughts():
    assert plan(make_curriculum(mode="drop", stages=2)) == [(0, 0, 0), (1, 1, 0), (2, 2, 0)]
    assert plan(make_curriculum(mode="pause", stages=1)) == [(0, 0, 0), (1, 1, 1)]
    assert plan(make_curriculum(mode="drop", stages=0)) == [(0, 0, 0)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first_stage": 4}, "first_stage must be at most"),
        ({"steps_per_stage": 40}, "would begin at step 120 of 100"),
        ({"steps_per_stage": [10, 10]}, "must list the steps of 3 stages"),
        ({"steps_per_stage": [10, 0, 10]}, "each at least 1"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_curriculum(**settings)


def test_mixing_takes_earlier_stages_only():
    """A chi-square test against the distribution that the recipe asks for."""
    curriculum = make_curriculum(stages=3, mix=0.3)
    for step in range(20):
        assert all(curriculum.of_item(step, 1, index).number == 0 for index in range(50))
    counts = Counter(curriculum.of_item(70, 1, index).number for index in range(20_000))
    expected = {3: 14_000, 0: 2_000, 1: 2_000, 2: 2_000}
    assert counts.keys() == expected.keys()
    chi_square = sum((counts[n] - e) ** 2 / e for n, e in expected.items())
    assert chi_square < 16.3  # p = 0.001 for 3 degrees of freedom.


def test_mixing_depends_only_on_seed_step_and_index():
    curriculum = make_curriculum(stages=3, mix=0.5)
    first = [curriculum.of_item(70, 1, index).number for index in range(200)]
    assert first == [curriculum.of_item(70, 1, index).number for index in range(200)]
    assert first != [curriculum.of_item(70, 2, index).number for index in range(200)]
    assert first != [curriculum.of_item(71, 1, index).number for index in range(200)]


def test_rows_are_shuffled_in_each_epoch():
    """A row depends only on its index and the seed, and has the stage of its step."""
    curriculum = make_curriculum(stages=3, mix=0.5)
    thinking: Any = SimpleNamespace(curriculum=curriculum, row=lambda example, stage: (example, stage))

    def rows(seed):
        dataset = ThinkingRows(thinking, range(30), rows_per_step=4, steps=100, seed=seed)
        assert len(dataset) == 400
        backwards = [dataset[index] for index in reversed(range(400))]
        assert [dataset[index] for index in range(400)] == backwards[::-1]
        return backwards[::-1]

    order = [example for example, _ in rows(1)]
    epochs = [tuple(order[start : start + 30]) for start in range(0, 390, 30)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs) and len(set(epochs)) == 13
    assert [stage for _, stage in rows(1)] == [curriculum.of_item(n // 4, 1, n % 4) for n in range(400)]
    assert order != [example for example, _ in rows(2)]
