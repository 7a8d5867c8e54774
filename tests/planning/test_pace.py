"""Time, energy and bytes sent, against formulas."""

import pytest
from planning_recipes import stages

from calm.flops import training_flops
from calm.planning.devices import CARDS, Devices
from calm.planning.memory import Footprint, bytes_of
from calm.planning.pace import SpeedAssumptions, bytes_sent, pace_of

SPEED = SpeedAssumptions(utilisation=0.5, link=1e9)


def plan_and_pace(count=1, sharing="one process", speed=SPEED, card="H100", **settings):
    planned = Footprint(stages(devices=count, **settings)[-1])
    return planned, pace_of(planned, sharing, Devices(count, CARDS[card]), speed)


def test_time_is_flops_at_the_assumed_speed():
    planned, pace = plan_and_pace()
    stage = planned.stage
    assert pace.flops == training_flops(stage.config, 64) * 512
    assert pace.seconds["compute"] == pytest.approx(pace.flops / (0.5 * 67e12))  # float32
    assert pace.seconds["communication"] == pace.sent == 0
    assert pace.total_seconds == pytest.approx(stage.settings.steps * sum(pace.seconds.values()))
    assert pace.tokens_per_second == pytest.approx(512 / sum(pace.seconds.values()))
    assert pace.kilowatt_hours == pytest.approx(700 * pace.total_seconds / 3600 / 1000)


def test_half_precision_is_computed_at_its_own_rate():
    _, pace = plan_and_pace(language_model__training__precision="bf16")
    assert pace.seconds["compute"] == pytest.approx(pace.flops / (0.5 * 989.4e12))


def test_checkpointing_adds_a_third_of_the_compute():
    """It repeats the forward pass; a backward pass takes two forward passes."""
    _, plain = plan_and_pace()
    _, checkpointed = plan_and_pace(language_model__training__gradient_checkpointing=True)
    assert checkpointed.seconds["compute"] == pytest.approx(plain.seconds["compute"] * 4 / 3)
    assert checkpointed.flops == plain.flops


def test_devices_share_compute_and_with_fsdp_the_optimizer():
    _, one = plan_and_pace()
    _, eight = plan_and_pace(8, "DDP")
    assert eight.seconds["compute"] == pytest.approx(one.seconds["compute"] / 8)
    assert eight.seconds["optimizer"] == pytest.approx(one.seconds["optimizer"])
    _, sharded = plan_and_pace(8, "FSDP", language_model__training__optimizer__name="adamw")
    _, replicated = plan_and_pace(8, "DDP", language_model__training__optimizer__name="adamw")
    assert sharded.seconds["optimizer"] == pytest.approx(replicated.seconds["optimizer"] / 8)


def test_optimizer_takes_the_time_of_its_memory_traffic():
    """AdamW: weights and two states are read and written, gradients read."""
    planned, pace = plan_and_pace(language_model__training__optimizer__name="adamw")
    moved = 7 * bytes_of(planned.trained)
    assert pace.seconds["optimizer"] == pytest.approx(moved / 3350e9, rel=0.01)


def test_bytes_sent():
    planned, _ = plan_and_pace()
    groups, weights = planned.groups, bytes_of(planned.trained)
    assert bytes_sent(planned, "DDP", 4, passes=3) == 2 * 3 / 4 * weights
    gathered_twice = sum(map(bytes_of, groups.layers)) + bytes_of(groups.embedding)
    gathered = bytes_of(groups.root) + 2 * gathered_twice
    matrices = bytes_of(w for w in planned.trained if w.ndim == 2 and w is not groups.embedding[0])
    boundary = planned.stage.network.head.boundary_layers()
    matrices -= sum(layer.weight.nbytes for layer in boundary)
    assert bytes_sent(planned, "FSDP", 4, passes=1) == 3 / 4 * (gathered + weights + matrices)
    assert bytes_sent(planned, "FSDP", 4, passes=3) == 3 / 4 * (3 * gathered + weights + matrices)
    adamw, _ = plan_and_pace(language_model__training__optimizer__name="adamw")
    assert bytes_sent(adamw, "FSDP", 4, passes=1) == 3 / 4 * (gathered + weights)
    assert bytes_sent(planned, "one process", 1, passes=3) == 0


def test_slower_of_compute_and_communication_bounds_the_step():
    _, fast_link = plan_and_pace(
        8, "DDP", SpeedAssumptions(0.001, 1e12), language_model__training__optimizer__name="adamw"
    )
    _, slow_link = plan_and_pace(8, "DDP", SpeedAssumptions(1, 1e6))
    assert fast_link.bound == "compute" and slow_link.bound == "communication"
    assert slow_link.step_seconds == slow_link.seconds["communication"] + slow_link.seconds["optimizer"]
    assert fast_link.step_seconds == fast_link.seconds["compute"] + fast_link.seconds["optimizer"]
