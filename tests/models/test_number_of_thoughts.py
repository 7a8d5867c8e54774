"""Numbers of thoughts in configurations and calls: valid ranges, passes and warnings."""

import json

import pytest
import torch
from tiny import tiny_config, tiny_llama

from calm.models.thoughts import Thoughts, num_at_once, thoughts_for, thoughts_of


@pytest.mark.parametrize(
    "changes",
    [
        {"number": -1},
        {"number": 2.5},
        {"number": True},
        {"begin": 40},
        {"end": -3},
        {"filling": "dream"},
        {"scale": 0},
        {"scale": "rms"},
        {"scale": float("nan")},
        {"more": 1},
    ],
)
def test_malformed_thoughts_in_a_configuration_are_refused(tmp_path, changes):
    model = tiny_llama()
    model.config.thoughts = {**Thoughts(2, 1, 2).as_dict(), **changes}
    with pytest.raises(ValueError, match="thoughts"):
        thoughts_of(model.config)
    entry = json.loads(json.dumps({**Thoughts(2, 1, 2).as_dict(), **changes}))
    with pytest.raises(ValueError, match="thoughts"):
        tiny_config(2, thoughts=entry)


@pytest.mark.parametrize("number", [-1, 10_001, 1.5, True, "3"])
def test_num_thoughts_out_of_range_are_refused(number):
    with pytest.raises(ValueError, match="num_thoughts"):
        thoughts_for(tiny_llama().config, number)


@pytest.mark.parametrize(
    ("before", "thoughts", "after", "expected"), [(0, 3, 2, 5), (5, 8, 2, 15), (1, 9, 1, 9)]
)
def test_positions_are_read_up_to_the_ninth_thought(before, thoughts, after, expected):
    is_thought = torch.tensor([False] * before + [True] * thoughts + [False] * after)
    assert num_at_once(is_thought) == expected


def test_warnings_about_untrained_thoughts(caplog):
    config = tiny_llama().config
    thoughts_for(config, 2, warns=True)
    assert "not trained with thoughts" in caplog.text
    config.thoughts = Thoughts(2, 1, 2).as_dict()
    caplog.clear()
    assert thoughts_for(config, 2, warns=True).number == 2 and not caplog.text
    thoughts_for(config, 3, warns=True)
    assert "3 thoughts are more than the 2" in caplog.text
