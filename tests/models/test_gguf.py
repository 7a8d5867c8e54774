"""Models read from GGUF files equal those that were written, within the rounding of the stored type."""

import numpy as np
import pytest
import torch
from gguf_files import gguf_is_not_read, write_gguf
from safetensors.torch import load_file
from toy import failure
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config

from calm.data.stories import stories
from calm.data.tokenizer import load_tokenizer, train_tokenizer
from calm.errors import InputError
from calm.models import missing
from calm.models.loading import config_of, load_language_model_and_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# transformers does not read the size of a Qwen3's heads, which is 128 in all of them.
MODELS = {
    "llama": LlamaConfig(**SIZES, vocab_size=300),
    "llama, tied": LlamaConfig(**SIZES, vocab_size=300, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "qwen2": Qwen2Config(**SIZES, vocab_size=300),
    "qwen3": Qwen3Config(**SIZES, vocab_size=300, head_dim=128),
}
pytestmark = pytest.mark.skipif(gguf_is_not_read(), reason="needs transformers 5.23")
HALF_ROUNDING = 2.0**-11  # Largest relative rounding error of a number in half precision.


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(stories(0, 12), 300)


def model_of(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (1 if weight.ndim == 1 else 0))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_loaded_file_is_the_model_that_was_written(name, tokenizer, tmp_path):
    model, file = model_of(name), tmp_path / "model.gguf"
    write_gguf(file, model, tokenizer)
    loaded, loaded_tokenizer = load_language_model_and_tokenizer(str(file), dtype=torch.float32)
    weights = model.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[key]) for key, weight in loaded.state_dict().items())
    ids = torch.randint(3, 300, (2, 40))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    texts = [*stories(20, 24), "Ünïcode 日本 12,345!", "<|eos|>", ""]
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded_tokenizer(texts).input_ids == tokenizer(texts).input_ids
    assert load_tokenizer(str(file)).pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_weights_are_within_the_rounding_of_their_type(kind, tokenizer, tmp_path):
    model = model_of("llama")
    write_gguf(tmp_path / "model.gguf", model, tokenizer, kind)
    loaded, _ = load_language_model_and_tokenizer(str(tmp_path / "model.gguf"), dtype=torch.float32)
    is_rounded = False
    for key, weight in model.state_dict().items():
        # Q8_0 stores 32 numbers in a row as integers from -127 to 127 times a scale in half precision.
        blocks = weight.unflatten(-1, (-1, 32)).abs()
        step = blocks.amax(-1, keepdim=True) / 127
        max_error = blocks * HALF_ROUNDING if kind == "F16" else step / 2 + 127 * step * HALF_ROUNDING
        max_error = torch.zeros(()) if weight.ndim == 1 else max_error
        error = (loaded.state_dict()[key] - weight).unflatten(-1, (-1, 32)).abs()
        assert (error <= max_error + 1e-7).all(), key
        is_rounded |= bool(error.any())
    assert is_rounded


def test_loaded_model_is_saved_as_an_ordinary_one(tokenizer, tmp_path):
    write_gguf(tmp_path / "model.gguf", model_of("llama"), tokenizer, "Q8_0")
    loaded, loaded_tokenizer = load_language_model_and_tokenizer(
        str(tmp_path / "model.gguf"), dtype=torch.float32
    )
    loaded.save_pretrained(tmp_path / "saved")
    loaded_tokenizer.save_pretrained(tmp_path / "saved")
    assert "quantization" not in (tmp_path / "saved/config.json").read_text()
    weights = load_file(tmp_path / "saved/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(weight, loaded.state_dict()[key]) for key, weight in reloaded.state_dict().items())
    loaded.train()(
        torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)
    ).loss.backward()


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def truncate_in_header(file):
    file.write_bytes(file.read_bytes()[:300])


def overwrite(file):
    file.write_bytes(b"not a model" * 100)


def empty(file):
    file.write_bytes(b"")


def claim_too_many_tensors(file):
    data = bytearray(file.read_bytes())
    data[8:16] = (2**60).to_bytes(8, "little")  # The number of tensors.
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, truncate_in_header, overwrite, empty, claim_too_many_tensors])
def test_damaged_file_is_refused_with_one_sentence(damage, tokenizer, tmp_path, capsys):
    file = write_gguf(tmp_path / "model.gguf", model_of("llama"), tokenizer)
    damage(file)
    message = failure(capsys, "generate", file, "Once")
    assert f"cannot load '{file}': it is damaged, or not supported (" in message
    with pytest.raises(InputError, match=r"cannot load a tokenizer from|is damaged"):
        load_tokenizer(str(file)) and load_language_model_and_tokenizer(str(file))


REFUSED = {
    "scaled positions": ({"scaling": "yarn"}, "uses RoPE scaling"),
    "frequency factors": ({"more": {"rope_freqs.weight": np.ones(4, np.float32)}}, "uses RoPE scaling"),
    "a bias": ({"more": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, "contains blk.0.attn_q.bias, which"),
    "another architecture": ({"architecture": "gpt2"}, "type 'gpt2', which cannot be read from GGUF"),
    "an unknown architecture": ({"architecture": "nobody"}, "architecture nobody is not supported"),
    "a missing tensor": ({"leave_out": "1.mlp.up_proj"}, "incomplete: 1 tensors are missing"),
    "a wrong width": ({"width": 64}, r"weight has shape \[300, 32\] instead of \[300, 64\]"),
    "many layers": ({"layers": 10**6}, "describes 1,000,000 layers"),
    "wide layers": ({"width": 10**9}, "describes 2 layers and"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_file_with_unsupported_contents_is_refused(changes, message, tokenizer, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", model_of("llama"), tokenizer, **changes)
    with pytest.raises(InputError, match=message):
        load_language_model_and_tokenizer(str(file))


def test_scaling_type_none_is_accepted(tokenizer, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", model_of("llama"), tokenizer, scaling="none")
    assert load_language_model_and_tokenizer(str(file))[0].config.model_type == "llama"


def test_changed_file_is_read_again(tokenizer, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", model_of("llama"), tokenizer)
    assert not config_of(str(file)).tie_word_embeddings
    file.unlink()
    write_gguf(file, model_of("llama, tied"), tokenizer)
    assert config_of(str(file)).tie_word_embeddings


def test_missing_files_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("model.gguf", "here/model.gguf", "here/owner/model.gguf", "owner/model.gguf"):
        assert f"cannot load '{name}': there is no such file" in failure(capsys, "generate", name, "Once")
        with pytest.raises(InputError, match=f"no tokenizer file '{name}'"):
            load_tokenizer(name)
    monkeypatch.setattr(missing.constants, "HF_HUB_OFFLINE", True)
    message = failure(capsys, "generate", "owner/name/sub/model.gguf", "Once")
    assert (
        "it is not a local folder, and it could not be loaded from the hub (HF_HUB_OFFLINE is set)" in message
    )


def test_file_of_the_hub_is_read_from_the_cache(tokenizer, tmp_path, monkeypatch):
    """The cache has the layout of the hub's client; the hub itself is not queried."""
    model = model_of("llama")
    snapshot = tmp_path / "models--owner--name/snapshots" / ("0" * 40)
    (snapshot / "sub").mkdir(parents=True)
    (tmp_path / "models--owner--name/refs").mkdir()
    (tmp_path / "models--owner--name/refs/main").write_text("0" * 40)
    write_gguf(snapshot / "sub/model.gguf", model, tokenizer)
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(missing.constants, "HF_HUB_OFFLINE", True)
    missing.check_model_exists("owner/name/sub/model.gguf")
    loaded, _ = load_language_model_and_tokenizer("owner/name/sub/model.gguf", dtype=torch.float32)
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)


def test_older_transformers_is_refused_with_one_sentence(tokenizer, tmp_path, monkeypatch, capsys):
    file = write_gguf(tmp_path / "model.gguf", model_of("llama"), tokenizer)
    monkeypatch.setattr("transformers.__version__", "5.22.1")
    assert "needs transformers 5.23 or newer" in failure(capsys, "generate", file, "Once")


def test_missing_package_is_reported_with_one_sentence(tokenizer, tmp_path, monkeypatch, capsys):
    file = write_gguf(tmp_path / "model.gguf", model_of("llama"), tokenizer)
    monkeypatch.setattr("calm.extras.is_installed", lambda package: package != "gguf")
    message = failure(capsys, "generate", file, "Once")
    assert f"'{file}', a GGUF file, needs gguf, which is not installed: pip install gguf" in message
    with pytest.raises(InputError, match="needs gguf"):
        load_tokenizer(str(file))
