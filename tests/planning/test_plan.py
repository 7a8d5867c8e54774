"""Whole plans: one device or several, microbatches, and JSON."""

import dataclasses
import json

import pytest
from planning_recipes import SMALL, SMALL_AUTOENCODER

from calm.planning.devices import CARDS, Devices
from calm.planning.memory import GRADIENTS, WEIGHTS
from calm.planning.pace import SpeedAssumptions
from calm.planning.plan import make_plan
from calm.training.recipe_files import read_recipe, with_settings

SPEED = SpeedAssumptions(0.4, 50e9)


def plan(devices=1, memory=24e9, **settings):
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    recipe = with_settings(read_recipe("demo"), SMALL | SMALL_AUTOENCODER | changes)
    card = dataclasses.replace(CARDS["L4"], memory=memory)
    return make_plan(recipe, Devices(devices, card), SPEED)


def test_one_device():
    planned = plan()
    assert [stage.name for stage in planned.stages] == ["autoencoder", "language model"]
    for stage in planned.stages:
        assert list(stage.options) == ["one process"] and stage.sharing == "one process"
        assert stage.microbatch == 512 and stage.passes == 1
        assert stage.options["one process"].fits and stage.options["one process"].largest == 512
    assert planned.seconds == sum(stage.pace.total_seconds for stage in planned.stages)


def test_several_devices_share_a_step():
    planned = plan(4, language_model__training__microbatch_tokens=64)
    autoencoder, model = planned.stages
    assert list(autoencoder.options) == ["DDP"] and list(model.options) == ["DDP", "FSDP"]
    assert (model.microbatch, model.passes, model.sharing) == (64, 2, "DDP")
    assert model.options["FSDP"].parts[WEIGHTS] < model.options["DDP"].parts[WEIGHTS] / 3
    assert plan(4, language_model__sharded=True).stages[-1].sharing == "FSDP"


def test_accumulated_gradients_are_not_sharded():
    """FSDP keeps full gradients from microbatch to microbatch."""
    summed = plan(4, language_model__training__microbatch_tokens=64).stages[-1].options["FSDP"].parts
    assert summed[GRADIENTS] > 3 * summed[WEIGHTS]


def test_largest_microbatch_fits_in_memory():
    """On a card that has room for three blocks, but not for four."""

    def needed(blocks):
        microbatch = {"language_model__training__microbatch_tokens": 64 * blocks}
        stage = plan(**microbatch, language_model__training__batch_tokens=64 * 2 * blocks).stages[-1]
        assert stage.microbatch == 64 * blocks and stage.passes == 2
        return sum(stage.options["one process"].parts.values())

    option = plan(memory=(needed(3) + needed(4)) / 2 / 0.92).stages[-1].options["one process"]
    assert option.largest == 3 * 64 and not option.fits and option.largest_checkpointed > option.largest
    too_small = plan(memory=1e5).stages[-1].options["one process"]
    assert not too_small.fits and too_small.largest == 0


def test_plan_as_json():
    planned = plan(2)
    figures = json.loads(json.dumps(planned.as_figures()))
    stage = figures["stages"]["language model"]
    exported, option = stage["ways"]["DDP"], planned.stages[-1].options["DDP"]
    assert exported["memory"] == option.parts | {"all": sum(option.parts.values())}
    assert exported["fits"] is option.fits
    assert exported["seconds"] == pytest.approx(stage["steps"] * exported["seconds_of_step"]["all"])
    assert figures["assumed"] == {"utilisation": 0.4, "link": 50e9} and figures["devices"] == 2
    assert figures["serving"]["rates"][0]["bound"] in ("bandwidth", "compute")
