"""Damaged and inconsistent model folders are refused with one sentence, before memory is allocated."""

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
def intact_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    tokenizer = train_tokenizer(stories(0, 20), 300)
    tiny_model(vocab_size=320).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(intact_folder, tmp_path):
    shutil.copytree(intact_folder, tmp_path / "model")
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
def test_configuration_out_of_range_is_refused(name, value, message, folder):
    set_in(folder / "config.json", name.strip(), value)
    with pytest.raises(InputError, match=message) as raised:
        load_model(str(folder))
    assert "\n" not in str(raised.value)


def test_configuration_out_of_range_is_refused_by_from_pretrained(folder):
    set_in(folder / "config.json", "backbone_config.num_hidden_layers", 10**12)
    with pytest.raises(ValueError, match="num_hidden_layers must be at least 1 and at most 10,000"):
        CalmForCausalLM.from_pretrained(folder)


def test_sizes_that_the_weights_do_not_have_allocate_no_memory(folder, monkeypatch):
    """The headers are enough to refuse it; the model is never built."""
    set_in(folder / "config.json", "autoencoder_config.hidden_size", 10**6)
    monkeypatch.setattr(CalmForCausalLM, "from_pretrained", None)
    with pytest.raises(InputError, match=r"do not belong together|do not fit their configuration"):
        load_model(str(folder))


def _change_first_matrix(change):
    def change_weights(folder):
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in sorted(weights) if weights[name].dim() == 2)
        weights[name] = change(weights[name])
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return change_weights


def _claim_a_huge_header(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 2**40) + content[8:])


WEIGHTS = {
    "NaN": (_change_first_matrix(lambda weight: weight * float("nan")), "holds NaN or infinity"),
    "infinity": (_change_first_matrix(lambda weight: weight + float("inf")), "holds NaN or infinity"),
    "complex": (
        _change_first_matrix(lambda weight: weight.to(torch.complex64)),
        "has dtype C64, which is not floating point",
    ),
    "whole numbers": (
        _change_first_matrix(lambda weight: weight.to(torch.int64)),
        "has dtype I64, which is not floating point",
    ),
    "truth values": (
        _change_first_matrix(lambda weight: weight > 0),
        "has dtype BOOL, which is not floating point",
    ),
    "another shape": (_change_first_matrix(lambda weight: weight[:-1].contiguous()), "instead of"),
    "a lying header": (_claim_a_huge_header, "is truncated or damaged"),
    "nothing": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is truncated or damaged"),
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), "there are no weights in"),
}


@pytest.mark.parametrize(("change", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_invalid_weights_are_refused(change, message, folder):
    change(folder)
    with pytest.raises(InputError, match=message):
        load_model(str(folder))


def test_wrong_shape_in_a_transformer_is_named(tmp_path):
    model = tiny_llama().float()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    with pytest.raises(
        InputError, match=r"layers\.0\.mlp\.down_proj\.weight has shape \[16, 32\] instead of"
    ):
        load_transformer(str(tmp_path))


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"cannot load the tokenizer in .* \(it has no tokenizer files\)"):
        load_language_model_and_tokenizer(str(tmp_path))


def test_folder_in_place_of_the_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(InputError, match="there are no weights in"):
        load_model(str(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_floating_point_types_are_read(dtype, folder):
    weights = {name: weight.to(dtype) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    loaded = load_model(str(folder), dtype=torch.float32).state_dict()
    assert all((loaded[name] == weight.float()).all() for name, weight in weights.items())


def test_shards_are_read(folder):
    expected = load_model(str(folder)).state_dict()
    model = load_model(str(folder))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert read_headers(folder).keys() >= {name for name, _ in model.backbone.named_parameters("backbone")}
    actual = load_model(str(folder)).state_dict()
    assert all((actual[name] == weight).all() for name, weight in expected.items())


INDICES = {
    "a parent folder": ({"weight_map": {"a": "../model.safetensors"}}, "names a file outside its folder"),
    "an absolute path": ({"weight_map": {"a": "/etc/passwd"}}, "names a file outside its folder"),
    "a missing file": (
        {"weight_map": {"a": "none.safetensors"}},
        "names 'none.safetensors', which is missing",
    ),
    "numbers": ({"weight_map": {"a": 1}}, "has no weight_map of names"),
    "empty": ({"weight_map": {}}, "has no weight_map of names"),
    "no map": ({"metadata": {}}, "has no weight_map of names"),
}


@pytest.mark.parametrize(("index", "message"), INDICES.values(), ids=INDICES)
def test_invalid_indices_of_shards_are_refused(index, message, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        load_model(str(folder))


OTHER_FILES = {
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


OTHER_SETTINGS = [
    (file, name, *value) for file, fields in OTHER_FILES.items() for name, value in fields.items()
]


@pytest.mark.parametrize(("file", "name", "value", "message"), OTHER_SETTINGS)
def test_invalid_settings_in_other_files_are_refused(file, name, value, message, folder):
    set_in(folder / file, name, value)
    with pytest.raises(InputError, match=message):
        load_language_model_and_tokenizer(str(folder))


def change_tokenizer(file, change):
    settings = json.loads(file.read_text())
    change(settings["model"]["vocab"], settings)
    file.write_text(json.dumps(settings))


TOKENIZERS = {
    "an id beyond the vocabulary": (
        lambda vocab, _: vocab.update({"zzz": 10**6}),
        "1000000|more than the model",
    ),
    "ids twice": (lambda vocab, _: vocab.update(dict.fromkeys(vocab, 5)), "tokenizer"),
    "no vocabulary": (lambda vocab, _: vocab.clear(), "tokenizer"),
    "merges of unknown tokens": (
        lambda _, settings: settings["model"].update(merges=[["qq", "zz"]]),
        "tokenizer",
    ),
}


@pytest.mark.parametrize(("change", "message"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_invalid_tokenizers_are_refused_or_harmless(change, message, folder):
    change_tokenizer(folder / "tokenizer.json", change)
    try:
        _, tokenizer = load_language_model_and_tokenizer(str(folder))
    except InputError as error:
        assert message.split("|")[0] in str(error) or message.split("|")[-1] in str(error)
        assert "\n" not in str(error)
    else:
        assert max(tokenizer.get_vocab().values()) < 320


@pytest.mark.parametrize("field", ["return_dict", "backbone_config.return_dict"])
def test_generation_works_if_tuples_are_configured(field, folder):
    set_in(folder / "config.json", field, False)
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert load_model(str(folder)).generate(tokens, max_new_tokens=4, seed=1).shape == (1, 8)


def test_long_messages_are_shortened():
    message = str(InputError("the start " + "x" * 10**6 + " the end"))
    assert len(message) < 2100 and message.startswith("the start") and message.endswith("the end")
