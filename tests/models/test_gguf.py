"""Models in GGUF files: against the same model as it was saved by transformers, within the stored type."""

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
HALF = 2.0**-11  # Half of the last place of a number of 11 bits.


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
def test_a_file_is_the_model_that_was_written(name, tokenizer, tmp_path):
    model, file = model_of(name), tmp_path / "model.gguf"
    write_gguf(file, model, tokenizer)
    read, words = load_language_model_and_tokenizer(str(file), dtype=torch.float32)
    weights = model.state_dict()
    assert read.state_dict().keys() == weights.keys()
    assert all(torch.equal(one, weights[key]) for key, one in read.state_dict().items())
    ids = torch.randint(3, 300, (2, 40))
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)
    texts = [*stories(20, 24), "Ünïcode 日本 12,345!", "<|eos|>", ""]
    assert words.get_vocab() == tokenizer.get_vocab()
    assert words(texts).input_ids == tokenizer(texts).input_ids
    assert load_tokenizer(str(file)).pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_weights_are_within_their_type(kind, tokenizer, tmp_path):
    model = model_of("llama")
    write_gguf(tmp_path / "model.gguf", model, tokenizer, kind)
    read, _ = load_language_model_and_tokenizer(str(tmp_path / "model.gguf"), dtype=torch.float32)
    is_rounded = False
    for key, weight in model.state_dict().items():
        # Q8_0: 32 numbers in a row are whole multiples of a half-precision scale, of at most 127.
        blocks = weight.unflatten(-1, (-1, 32)).abs()
        step = blocks.amax(-1, keepdim=True) / 127
        most = blocks * HALF if kind == "F16" else step / 2 + 127 * step * HALF
        most = torch.zeros(()) if weight.ndim == 1 else most
        off = (read.state_dict()[key] - weight).unflatten(-1, (-1, 32)).abs()
        assert (off <= most + 1e-7).all(), key
        is_rounded |= bool(off.any())
    assert is_rounded


def test_what_is_saved_of_it_is_an_ordinary_model(tokenizer, tmp_path):
    write_gguf(tmp_path / "model.gguf", model_of("llama"), tokenizer, "Q8_0")
    read, words = load_language_model_and_tokenizer(str(tmp_path / "model.gguf"), dtype=torch.float32)
    read.save_pretrained(tmp_path / "saved")
    words.save_pretrained(tmp_path / "saved")
    assert "quantization" not in (tmp_path / "saved/config.json").read_text()
    weights = load_file(tmp_path / "saved/model.safetensors")
    assert {one.dtype for one in weights.values()} == {torch.float32}
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(one, read.state_dict()[key]) for key, one in again.state_dict().items())
    read.train()(
        torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)
    ).loss.backward()


def cut_off(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def cut_in_head(file):
    file.write_bytes(file.read_bytes()[:300])


def overwritten(file):
    file.write_bytes(b"not a model" * 100)


def emptied(file):
    file.write_bytes(b"")


def counting_wrongly(file):
    data = bytearray(file.read_bytes())
    data[8:16] = (2**60).to_bytes(8, "little")  # Tensors.
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_off, cut_in_head, overwritten, emptied, counting_wrongly])
def test_a_damaged_file_is_one_sentence(damage, tokenizer, tmp_path, capsys):
    file = write_gguf(tmp_path / "model.gguf", model_of("llama"), tokenizer)
    damage(file)
    said = failure(capsys, "generate", file, "Once")
    assert f"cannot load '{file}': it is damaged (" in said
    with pytest.raises(InputError, match=r"cannot load a tokenizer from|is damaged"):
        load_tokenizer(str(file)) and load_language_model_and_tokenizer(str(file))


REFUSED = {
    "scaled positions": ({"scaling": "yarn"}, "uses RoPE scaling"),
    "factors": ({"more": {"rope_freqs.weight": np.ones(4, np.float32)}}, "uses RoPE scaling"),
    "a bias": ({"more": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, "contains blk.0.attn_q.bias, which"),
    "another kind": ({"architecture": "gpt2"}, "type 'gpt2', which cannot be read from GGUF"),
    "unheard of": ({"architecture": "nobody"}, "nobody"),
    "a missing tensor": ({"leave_out": "1.mlp.up_proj"}, "incomplete: 1 tensors are missing"),
    "a wrong width": ({"width": 64}, r"weight has shape \[300, 32\] instead of \[300, 64\]"),
    "many layers": ({"layers": 10**6}, "describes 1,000,000 layers"),
    "wide layers": ({"width": 10**9}, "describes 2 layers and"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_all_read_is_refused(changes, message, tokenizer, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", model_of("llama"), tokenizer, **changes)
    with pytest.raises(InputError, match=message):
        load_language_model_and_tokenizer(str(file))


def test_scaling_by_nothing_is_none(tokenizer, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", model_of("llama"), tokenizer, scaling="none")
    assert load_language_model_and_tokenizer(str(file))[0].config.model_type == "llama"


def test_a_file_that_has_changed_is_read_anew(tokenizer, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", model_of("llama"), tokenizer)
    assert not config_of(str(file)).tie_word_embeddings
    file.unlink()
    write_gguf(file, model_of("llama, tied"), tokenizer)
    assert config_of(str(file)).tie_word_embeddings


def test_places_that_there_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("model.gguf", "here/model.gguf", "here/owner/model.gguf", "owner/model.gguf"):
        assert f"cannot load '{name}': there is no such file" in failure(capsys, "generate", name, "Once")
        with pytest.raises(InputError, match=f"no tokenizer file '{name}'"):
            load_tokenizer(name)
    monkeypatch.setattr(missing.constants, "HF_HUB_OFFLINE", True)
    said = failure(capsys, "generate", "owner/name/sub/model.gguf", "Once")
    assert "it is not a local folder, and it could not be loaded from the hub (HF_HUB_OFFLINE is set)" in said


def test_one_of_the_hub_is_taken_from_its_cache(tokenizer, tmp_path, monkeypatch):
    """A cache as the hub's client leaves it; nothing is asked."""
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
    read, _ = load_language_model_and_tokenizer("owner/name/sub/model.gguf", dtype=torch.float32)
    assert torch.equal(read.model.norm.weight, model.model.norm.weight)


def test_an_older_transformers_is_one_sentence(tokenizer, tmp_path, monkeypatch, capsys):
    file = write_gguf(tmp_path / "model.gguf", model_of("llama"), tokenizer)
    monkeypatch.setattr("transformers.__version__", "5.22.1")
    assert "needs transformers 5.23 or newer" in failure(capsys, "generate", file, "Once")


def test_without_the_package_it_is_one_sentence(tokenizer, tmp_path, monkeypatch, capsys):
    file = write_gguf(tmp_path / "model.gguf", model_of("llama"), tokenizer)
    monkeypatch.setattr("calm.extras.is_installed", lambda package: package != "gguf")
    said = failure(capsys, "generate", file, "Once")
    assert f"'{file}', a GGUF file, needs gguf, which is not installed: pip install gguf" in said
    with pytest.raises(InputError, match="needs gguf"):
        load_tokenizer(str(file))
