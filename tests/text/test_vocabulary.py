"""How many ids a tokenizer has, if some of them have no token."""

import json

import pytest
import torch
from other_tokenizers import byte_level, words
from toy import toy_recipe
from transformers import LlamaConfig, LlamaForCausalLM

from calm.data.prepared import load_prepared
from calm.data.tokenizer import load_tokenizer
from calm.errors import InputError
from calm.models.loading import load_language_model_and_tokenizer, load_model_and_tokenizer
from calm.text.vocabulary import check_ids, num_ids
from calm.training import stages
from calm.training.recipe_files import with_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tokenizer that skips ids, and a text that contains its highest id."""
    folder = tmp_path_factory.mktemp("base")
    words().save_pretrained(folder / "tokenizer")
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    highest = max(tokenizer.get_vocab().values())
    assert len(tokenizer) <= highest
    texts = [" ".join(tokenizer.convert_ids_to_tokens([*range(9 + n, 40 + n), highest])) for n in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def test_skipped_ids_count_as_ids(base):
    tokenizer = load_tokenizer(str(base / "tokenizer"))
    assert num_ids(tokenizer) == max(tokenizer.get_vocab().values()) + 1 > len(tokenizer)
    assert num_ids(byte_level()) == len(byte_level())
    check_ids(tokenizer, num_ids(tokenizer), "here")
    with pytest.raises(InputError, match=f"has token id {num_ids(tokenizer) - 1}, but the model has only"):
        check_ids(tokenizer, len(tokenizer), "here")


def test_trained_model_has_all_ids_of_its_tokenizer(base, tmp_path):
    sequential = {"head_type": "sequential", "num_blocks": 1, "token_size": 4, "rank": 4}
    settings = {"data.tokenizer": str(base / "tokenizer"), "language_model.head": sequential}
    settings |= {"autoencoder.kind": "codes", "autoencoder.latent_size": 32}
    recipe = with_settings(toy_recipe(base / "text.jsonl", "adamw"), settings)
    model, tokenizer = load_model_and_tokenizer(str(stages.train(recipe, tmp_path / "run")))
    assert load_prepared(tmp_path / "run/data").vocab_size == model.config.vocab_size == num_ids(tokenizer)


def test_source_model_that_lacks_ids_is_refused_before_training(base, tmp_path):
    tokenizer = load_tokenizer(str(base / "tokenizer"))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    layers = {"first_layers": 1, "last_layers": 1}
    settings = {f"language_model.uptraining.{name}": number for name, number in layers.items()}
    settings |= {"language_model.init_from": str(tmp_path / "source")}
    recipe = with_settings(toy_recipe(base / "text.jsonl", "adamw"), settings)
    for refuse in (
        lambda: stages.train(recipe, tmp_path / "run"),
        lambda: load_language_model_and_tokenizer(str(tmp_path / "source")),
    ):
        with pytest.raises(InputError, match="has token id"):
            refuse()
    assert not (tmp_path / "run").exists()
