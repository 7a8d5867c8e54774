"""Plans of uptraining: a CALM from a Transformer of which only the configuration is available."""

import json

import pytest
from toy import failure
from transformers import LlamaConfig

from calm.cli import main
from calm.errors import InputError
from calm.flops import Work, cost_of
from calm.planning.devices import CardFigures, devices_of
from calm.planning.memory import GATHERED, STATE, WEIGHTS, Footprint
from calm.planning.pace import SpeedAssumptions, pace_of
from calm.planning.stages import stages_of
from calm.training.continuing import config_to_continue
from calm.training.recipe_files import read_recipe, with_settings, write_recipe

INIT = "language_model.init_from"
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
LLAMA_3 = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "eos_token_id": [128001, 128009],
}
FIRST, LAST, SIZE = 2, 6, 4  # Of the recipes.
# Recipe, source, devices, GB per device, hours, and FLOPs per generated token relative to the source's.
PLANNED = [
    ("uptrain_one_gpu", SMOLLM2, "1xH100", 53.0, 14.5, 0.39),
    ("uptrain_eight_gpus", LLAMA_3, "8xH100", 47.9, 14.1, 0.40),
]


def weights_by_hand(sizes: dict) -> int:
    """Number of trained weights, from the sizes alone."""
    width, head_width = sizes["hidden_size"], sizes["hidden_size"] // sizes["num_attention_heads"]
    keys = head_width * sizes["num_key_value_heads"]
    layer = width * (2 * width + 2 * keys + 3 * sizes["intermediate_size"]) + 2 * width
    backbone, head = sizes["num_hidden_layers"] - LAST, FIRST + LAST
    tables = 1 if sizes["tie_word_embeddings"] else 2
    new = (SIZE + SIZE - 1) * width * width  # Mixed into the input, and added at later positions.
    sinks = head * 2 * keys
    return (backbone + head) * layer + tables * sizes["vocab_size"] * width + new + sinks + width


@pytest.mark.parametrize(("recipe", "sizes", "cards", "gigabytes", "hours", "share"), PLANNED)
def test_shipped_recipes_fit_on_their_gpus(recipe, sizes, cards, gigabytes, hours, share, tmp_path):
    source = LlamaConfig(**sizes)
    source.save_pretrained(tmp_path)
    devices = devices_of(cards, CardFigures())
    loaded = with_settings(read_recipe(recipe), {INIT: str(tmp_path)})
    [stage] = stages_of(loaded, devices.count)
    footprint = Footprint(stage)
    assert sum(weight.numel() for weight in footprint.trained) == weights_by_hand(sizes)
    blocks, passes = stage.settings.batches(stage.context, devices.count)
    sharing = "FSDP" if stage.is_sharded else "one process"
    assert stage.is_sharded == (devices.count > 1)
    parts = footprint.parts(blocks, sharing=sharing, devices=devices.count, is_summed=passes > 1)
    weight_bytes = 4 * weights_by_hand(sizes)
    assert parts[WEIGHTS] == pytest.approx(weight_bytes / devices.count, rel=1e-3)
    assert parts[STATE] == pytest.approx(2 * weight_bytes / devices.count, rel=1e-3)
    assert sum(parts.values()) / 1e9 == pytest.approx(gigabytes, abs=0.5)
    assert sum(parts.values()) < devices.device.usable
    pace = pace_of(footprint, sharing, devices, SpeedAssumptions(0.4, 50e9))
    assert pace.total_seconds / 3600 == pytest.approx(hours, abs=0.3)
    assert pace.steps * pace.step_tokens == loaded.language_model.training.tokens
    work = Work(positions=loaded.data.context // SIZE)
    source_flops = sum(cost_of(source, Work(positions=loaded.data.context)).inference.values())
    assert sum(cost_of(stage.config, work).inference.values()) / source_flops == pytest.approx(
        share, abs=0.01
    )


def small(tmp_path, **changes):
    """A recipe that starts from a small Transformer without weights or tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
    LlamaConfig(**sizes, vocab_size=300, **changes).save_pretrained(tmp_path / "source")
    training = {"batch_tokens": 256, "microbatch_tokens": 256, "steps": 4}
    settings = {f"language_model.training.{name}": value for name, value in training.items()}
    cut = {"language_model.uptraining.first_layers": 1, "language_model.uptraining.last_layers": 2}
    return with_settings(
        read_recipe("uptrain_one_gpu"),
        {INIT: str(tmp_path / "source"), "data.context": 64, **settings, **cut},
    )


@pytest.mark.parametrize("tied", [True, False])
def test_groups_have_layers_of_the_backbone_and_of_the_head(tied, tmp_path):
    [stage] = stages_of(small(tmp_path, tie_word_embeddings=tied))
    groups = Footprint(stage).groups
    assert len(groups.layers) == 3 + 3
    embedding = stage.network.get_input_embeddings().weight
    assert [id(weight) for weight in groups.embedding] == ([] if tied else [id(embedding)])
    assert (id(embedding) in map(id, groups.root)) == tied
    assert Footprint(stage).parts(1, sharing="FSDP", devices=2)[GATHERED] < stage.network.num_parameters() * 4


@pytest.mark.parametrize("eos_token_id", [0, 7, [9, 0], None])
def test_configuration_is_enough_for_flops_and_plan(eos_token_id, tmp_path, capsys):
    write_recipe(small(tmp_path, eos_token_id=eos_token_id), tmp_path / "recipe.yaml")
    config = config_to_continue(read_recipe(str(tmp_path / "recipe.yaml")))
    first_eos = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id or 0
    assert config.pad_token_id != config.eos_token_id == first_eos
    main(["flops", str(tmp_path / "recipe.yaml"), "--json"])
    counted = json.loads(capsys.readouterr().out)
    assert counted["chunk_size"] == 4 and counted["vocab_size"] == 300
    main(["plan", str(tmp_path / "recipe.yaml"), "--devices", "2xH100", "--json"])
    assert "language model" in json.loads(capsys.readouterr().out)["stages"]


def test_configuration_is_not_enough_to_train(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("A word.\n" * 99)
    recipe = with_settings(small(tmp_path), {"data.sources": str(tmp_path / "text.txt")})
    write_recipe(recipe, tmp_path / "recipe.yaml")
    message = failure(capsys, "train", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert "cannot load a tokenizer from" in message and not (tmp_path / "run").exists()


def test_overlapping_cuts_are_refused(tmp_path):
    recipe = with_settings(small(tmp_path), {"language_model.uptraining.last_layers": 5})
    with pytest.raises(InputError, match="must not overlap"):
        stages_of(recipe)
