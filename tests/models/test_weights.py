"""Folders of models that do not hold together are refused with one sentence, before memory is taken."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_model

from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer
from calm.errors import InputError
from calm.models.calm import CalmForCausalLM
from calm.models.loading import load_language_model_and_tokenizer, load_model, load_transformer
from calm.models.weights import read_headers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = train_tokenizer(stories(0, 20), 300)
    tiny_model(vocab_size=320).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def set_in(file, name, value):
    """Set a field of a JSON file, by its dotted name."""
    settings = json.loads(file.read_text())
    *path, last = name.split(".")
    inner = settings
    for part in path:
        inner = inner[part]
    inner[last] = value
    file.write_text(json.dumps(settings))


CONFIGURATIONS = {
    "backbone_config.num_hidden_layers": (10**12, "num_hidden_layers must be at least 1 and at most 10,000"),
    "backbone_config.num_hidden_layers ": (
        9_999,
        r"num_hidden_layers = 9,999, but the weights have only \d+ tensors",
    ),
    "backbone_config.hidden_size": (10**6, "describes .* parameters, but the weights have only .* bytes"),
    "autoencoder_config.intermediate_size": (7, r"has shape .* instead of \[7, "),
    "backbone_config.num_key_value_heads": (3, "must be a multiple of num_key_value_heads 3"),
    "backbone_config.rms_norm_eps": (-1.0, "rms_norm_eps must be above 0"),
    "backbone_config.rope_parameters.rope_theta": (-1.0, "rope_theta must be above 0"),
    "autoencoder_config.vocab_size": (10**9, "vocab_size must be at least 1 and at most 10,000,000"),
    "autoencoder_config.latent_size": ("8", "latent_size"),
    "autoencoder_config.latent_dropout": (1.0, "latent_dropout must be at least 0 and below 1"),
    "autoencoder_config.dropped_token_id": (10**6, "dropped_token_id must be a token id between 0 and"),
    "head_config.num_blocks": (10**6, "num_blocks must be a whole number of at most 10,000"),
    "head_config.alpha": (float("nan"), "alpha must be a finite number"),
    "eos_token_id": ([1, 10**6], "eos_token_id must be a token id between 0 and"),
    "pad_token_id": (-1, "pad_token_id must be a token id"),
    "bos_token_id": (True, "bos_token_id must be a token id"),
    "backbone_config.output_hidden_states": ("x", "output_hidden_states.*(must be true or false|match)"),
    "output_hidden_states": ([1.5], "output_hidden_states.*(must be true or false|match)"),
    "layer_norm_eps": (0.0, "layer_norm_eps must be above 0"),
    "initializer_range": (float("inf"), "initializer_range must be at least 0 and finite"),
}


@pytest.mark.parametrize(("name", "value", "message"), [(n, *v) for n, v in CONFIGURATIONS.items()])
def test_a_configuration_out_of_range(name, value, message, folder):
    set_in(folder / "config.json", name.strip(), value)
    with pytest.raises(InputError, match=message) as told:
        load_model(str(folder))
    assert "\n" not in str(told.value)


def test_a_user_who_loads_by_transformers_is_told_as_well(folder):
    set_in(folder / "config.json", "backbone_config.num_hidden_layers", 10**12)
    with pytest.raises(ValueError, match="num_hidden_layers must be at least 1 and at most 10,000"):
        CalmForCausalLM.from_pretrained(folder)


def test_sizes_that_the_weights_do_not_have_take_no_memory(folder, monkeypatch):
    """Refused by the headers: the model itself is never asked for."""
    set_in(folder / "config.json", "autoencoder_config.hidden_size", 10**6)
    monkeypatch.setattr(CalmForCausalLM, "from_pretrained", None)
    with pytest.raises(InputError, match=r"do not belong together|do not fit their configuration"):
        load_model(str(folder))


def _changed(change):
    def change_first(folder):
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in sorted(weights) if weights[name].dim() == 2)
        weights[name] = change(weights[name])
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return change_first


def _lying(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 2**40) + content[8:])


WEIGHTS = {
    "NaN": (_changed(lambda weight: weight * float("nan")), "holds NaN or infinity"),
    "infinity": (_changed(lambda weight: weight + float("inf")), "holds NaN or infinity"),
    "complex": (
        _changed(lambda weight: weight.to(torch.complex64)),
        "has dtype C64, which is not floating point",
    ),
    "whole numbers": (
        _changed(lambda weight: weight.to(torch.int64)),
        "has dtype I64, which is not floating point",
    ),
    "truth values": (_changed(lambda weight: weight > 0), "has dtype BOOL, which is not floating point"),
    "another shape": (_changed(lambda weight: weight[:-1].contiguous()), "instead of"),
    "a lying header": (_lying, "is truncated or damaged"),
    "nothing": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is truncated or damaged"),
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), "there are no weights in"),
}


@pytest.mark.parametrize(("change", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_none(change, message, folder):
    change(folder)
    with pytest.raises(InputError, match=message):
        load_model(str(folder))


def test_weights_of_another_shape_are_named_in_any_model(tmp_path):
    model = tiny_llama().float()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    with pytest.raises(
        InputError, match=r"layers\.0\.mlp\.down_proj\.weight has shape \[16, 32\] instead of"
    ):
        load_transformer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_called_that(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"cannot load the tokenizer in .* \(it has no tokenizer files\)"):
        load_language_model_and_tokenizer(str(tmp_path))


def test_a_folder_in_the_place_of_a_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(InputError, match="there are no weights in"):
        load_model(str(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_real_types_are_read(dtype, folder):
    weights = {name: weight.to(dtype) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    loaded = load_model(str(folder), dtype=torch.float32).state_dict()
    assert all((loaded[name] == weight.float()).all() for name, weight in weights.items())


def test_shards_are_read(folder):
    whole = load_model(str(folder)).state_dict()
    model = load_model(str(folder))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert read_headers(folder).keys() >= {name for name, _ in model.backbone.named_parameters("backbone")}
    again = load_model(str(folder)).state_dict()
    assert all((again[name] == weight).all() for name, weight in whole.items())


INDICES = {
    "elsewhere": ({"weight_map": {"a": "../model.safetensors"}}, "names a file outside its folder"),
    "from the root": ({"weight_map": {"a": "/etc/passwd"}}, "names a file outside its folder"),
    "missing": ({"weight_map": {"a": "none.safetensors"}}, "names 'none.safetensors', which is missing"),
    "numbers": ({"weight_map": {"a": 1}}, "has no weight_map of names"),
    "empty": ({"weight_map": {}}, "has no weight_map of names"),
    "another": ({"metadata": {}}, "has no weight_map of names"),
}


@pytest.mark.parametrize(("index", "message"), INDICES.values(), ids=INDICES)
def test_indices_that_lead_astray(index, message, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        load_model(str(folder))


BESIDE = {
    "generation_config.json": {
        "bos_token_id": ({}, "bos_token_id must be a token id"),
        "temperature": (float("nan"), "temperature must be at least 0 and finite"),
        "top_k": ("many", "top_k must be a number, got 'many'"),
        "do_sample": (2, "do_sample must be true or false"),
        "eos_token_id": ([1, None], "eos_token_id must be a token id between 0 and 319, got None"),
        "pad_token_id": ("x" * 1000, r"pad_token_id must be a token id .*, got 'x+\.\.\."),
        "output_hidden_states": ([None], "output_hidden_states must be true or false"),
    },
    "tokenizer_config.json": {
        "model_max_length": ([], "cannot load the tokenizer in "),
        "eos_token": ([1], "cannot load the tokenizer in "),
    },
}


ALL_BESIDE = [(file, name, *rest) for file, fields in BESIDE.items() for name, rest in fields.items()]


@pytest.mark.parametrize(("file", "name", "value", "message"), ALL_BESIDE)
def test_settings_beside_a_model(file, name, value, message, folder):
    set_in(folder / file, name, value)
    with pytest.raises(InputError, match=message):
        load_language_model_and_tokenizer(str(folder))


def vocabulary(file, change):
    settings = json.loads(file.read_text())
    change(settings["model"]["vocab"], settings)
    file.write_text(json.dumps(settings))


TOKENIZERS = {
    "an id far beyond": (lambda vocab, _: vocab.update({"zzz": 10**6}), "1000000|more than the model"),
    "ids twice": (lambda vocab, _: vocab.update(dict.fromkeys(vocab, 5)), "tokenizer"),
    "no vocabulary": (lambda vocab, _: vocab.clear(), "tokenizer"),
    "merges of nothing": (lambda _, all: all["model"].update(merges=[["qq", "zz"]]), "tokenizer"),
}


@pytest.mark.parametrize(("change", "message"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_that_are_absurd(change, message, folder):
    vocabulary(folder / "tokenizer.json", change)
    try:
        _, tokenizer = load_language_model_and_tokenizer(str(folder))
    except InputError as error:
        assert message.split("|")[0] in str(error) or message.split("|")[-1] in str(error)
        assert "\n" not in str(error)
    else:
        assert max(tokenizer.get_vocab().values()) < 320


@pytest.mark.parametrize("place", ["return_dict", "backbone_config.return_dict"])
def test_a_configuration_that_asks_for_tuples_writes_all_the_same(place, folder):
    set_in(folder / "config.json", place, False)
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert load_model(str(folder)).generate(tokens, max_new_tokens=4, seed=1).shape == (1, 8)


def test_what_a_file_says_does_not_flood_a_message():
    told = str(InputError("the start " + "x" * 10**6 + " the end"))
    assert len(told) < 2100 and told.startswith("the start") and told.endswith("the end")
