"""All of a plan, and what changes it."""

import dataclasses
import json

import pytest
from planning_recipes import SMALL, SMALL_AUTOENCODER

from calm.planning.devices import CARDS, Devices
from calm.planning.memory import GRADIENTS, WEIGHTS
from calm.planning.pace import Speed
from calm.planning.plan import make_plan
from calm.training.recipe_files import read_recipe, with_settings

SPEED = Speed(0.4, 50e9)


def plan(devices=1, memory=24e9, **settings):
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    recipe = with_settings(read_recipe("demo"), SMALL | SMALL_AUTOENCODER | changes)
    card = dataclasses.replace(CARDS["L4"], memory=memory)
    return make_plan(recipe, Devices(devices, card), SPEED)


def test_one_device():
    made = plan()
    assert [stage.name for stage in made.stages] == ["autoencoder", "language model"]
    for stage in made.stages:
        assert list(stage.options) == ["one process"] and stage.sharing == "one process"
        assert stage.microbatch == 512 and stage.passes == 1
        assert stage.options["one process"].fits and stage.options["one process"].largest == 512
    assert made.seconds == sum(stage.pace.total_seconds for stage in made.stages)


def test_several_devices_share_a_step():
    made = plan(4, language_model__training__microbatch_tokens=64)
    autoencoder, model = made.stages
    assert list(autoencoder.options) == ["DDP"] and list(model.options) == ["DDP", "FSDP"]
    assert (model.microbatch, model.passes, model.sharing) == (64, 2, "DDP")
    assert model.options["FSDP"].parts[WEIGHTS] < model.options["DDP"].parts[WEIGHTS] / 3
    assert plan(4, language_model__sharded=True).stages[-1].sharing == "FSDP"


def test_sums_of_gradients_are_not_sharded():
    """FSDP keeps whole gradients from microbatch to microbatch."""
    summed = plan(4, language_model__training__microbatch_tokens=64).stages[-1].options["FSDP"].parts
    assert summed[GRADIENTS] > 3 * summed[WEIGHTS]


def test_the_largest_microbatch_is_the_one_that_fits():
    """A card with room for the plan of three blocks and not of four."""

    def needed(blocks):
        how = {"language_model__training__microbatch_tokens": 64 * blocks}
        stage = plan(**how, language_model__training__batch_tokens=64 * 2 * blocks).stages[-1]
        assert stage.microbatch == 64 * blocks and stage.passes == 2
        return sum(stage.options["one process"].parts.values())

    made = plan(memory=(needed(3) + needed(4)) / 2 / 0.92).stages[-1].options["one process"]
    assert made.largest == 3 * 64 and not made.fits and made.largest_checkpointed > made.largest
    nothing = plan(memory=1e5).stages[-1].options["one process"]
    assert not nothing.fits and nothing.largest == 0


def test_figures_for_programs():
    made = plan(2)
    figures = json.loads(json.dumps(made.as_figures()))
    stage = figures["stages"]["language model"]
    way, own = stage["ways"]["DDP"], made.stages[-1].options["DDP"]
    assert way["memory"] == own.parts | {"all": sum(own.parts.values())} and way["fits"] is own.fits
    assert way["seconds"] == pytest.approx(stage["steps"] * way["seconds_of_step"]["all"])
    assert figures["assumed"] == {"utilisation": 0.4, "link": 50e9} and figures["devices"] == 2
    assert figures["serving"]["rates"][0]["bound"] in ("bandwidth", "compute")
