"""Plans with a teacher: its memory, and its FLOPs."""

from pathlib import Path

import pytest
import torch
from planning_recipes import SMALL
from toy import toy_source

from calm.errors import InputError
from calm.flops import teaching_flops, training_flops
from calm.models.loading import load_language_model_and_tokenizer
from calm.planning.devices import CARDS, Devices
from calm.planning.memory import ACTIVATIONS, BUCKETS, FROZEN, WORKSPACE, Footprint
from calm.planning.pace import SpeedAssumptions, pace_of
from calm.planning.plan import make_plan
from calm.planning.stages import stages_of
from calm.training.recipe_files import read_recipe, with_settings

SPEED, TEACHER = SpeedAssumptions(0.5, 1e9), "language_model.teacher.model"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return toy_source(tmp_path_factory.mktemp("teacher"))


def planned(source, recipe="demo_sequential", devices=1, **settings) -> Footprint:
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    changed = with_settings(read_recipe(recipe), SMALL | {"data.tokenizer": str(source)} | changes)
    return Footprint(stages_of(changed, devices, vocab_size=300)[-1])


@pytest.mark.parametrize("layout", ["documents", "packed"])
@pytest.mark.parametrize("recipe", ["demo_sequential", "demo_baseline"])
def test_teacher_adds_its_weights_activations_and_flops(recipe, layout, source):
    alone = planned(source, recipe, data__layout=layout)
    taught = planned(source, recipe, data__layout=layout, language_model__teacher__model=str(source))
    network, _ = load_language_model_and_tokenizer(str(source))
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    parts_alone, parts_taught = (footprint.parts(4) for footprint in (alone, taught))
    assert parts_taught[FROZEN] == parts_alone.get(FROZEN, 0) + weights
    assert sum(parts_taught.values()) > sum(parts_alone.values()) + weights
    paces = [
        pace_of(footprint, "one process", Devices(1, CARDS["H100"]), SPEED) for footprint in (alone, taught)
    ]
    tokens = taught.stage.settings.batch_tokens
    assert paces[0].flops == training_flops(alone.stage.config, 64) * tokens
    assert paces[1].flops == pytest.approx(paces[0].flops + teaching_flops(network.config, 64) * tokens)


def test_teacher_is_replicated_in_the_precision_of_training(source):
    settings = {"language_model__teacher__model": str(source), "devices": 4}
    taught, alone = planned(source, **settings), planned(source, devices=4)
    for sharing in ("DDP", "FSDP"):
        parts = [footprint.parts(1, sharing=sharing, devices=4) for footprint in (taught, alone)]
        assert parts[0][FROZEN] - parts[1].get(FROZEN, 0) == taught._teacher_bytes()
        assert parts[0].get(BUCKETS) == parts[1].get(BUCKETS)
    in_bf16 = planned(source, language_model__training__precision="bf16", **settings)
    assert in_bf16.stage.teacher.network.dtype == torch.bfloat16
    assert in_bf16._teacher_bytes() == taught._teacher_bytes() / 2


def test_uptrained_model_with_its_source_as_teacher(source):
    taught = {
        "language_model.init_from": str(source),
        "language_model.teacher.states": 1.0,
        TEACHER: str(source),
    }
    cut = {"language_model.uptraining.first_layers": 1, "language_model.uptraining.last_layers": 2}
    plan = make_plan(with_settings(read_recipe("demo"), SMALL | taught | cut), Devices(2, CARDS["L4"]), SPEED)
    [stage] = plan.stages
    assert stage.options["DDP"].parts[ACTIVATIONS] > 0 and stage.options["DDP"].parts.get(WORKSPACE, 0) > 0


def test_head_that_cannot_learn_from_a_teacher_is_refused(source):
    with pytest.raises(InputError, match="head of type 'energy' cannot learn"):
        planned(source, "demo", language_model__teacher__model=str(source))
