"""Names of models that come with the package."""

import pytest
from tiny import tiny_model

from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer
from calm.errors import InputError
from calm.models import shipped
from calm.models.loading import load_config, load_language_model_and_tokenizer, load_model


def test_package_without_models_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "files", lambda package: tmp_path)
    assert shipped.shipped_models() == {} and shipped.folder_of("small") == "small"
    with pytest.raises(InputError, match="it could not be loaded from the hub"):
        load_model("small")


def test_shipped_model_is_loaded_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "files", lambda package: tmp_path)
    folder = tmp_path / "shipped" / "small"
    tiny_model(4, vocab_size=320).save_pretrained(folder)
    train_tokenizer(stories(0, 20), 320).save_pretrained(folder)
    assert list(shipped.shipped_models()) == ["small"] and shipped.folder_of("small") == str(folder)
    model, tokenizer = load_language_model_and_tokenizer("small")
    assert model.config.vocab_size == load_config(folder).vocab_size == len(tokenizer) == 320
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert shipped.folder_of("small") == str(folder)
    (tmp_path / "small/config.json").write_text("{}")
    assert shipped.folder_of("small") == "small", "a local model takes precedence"


def test_tokenizer_is_found_by_the_name_of_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "files", lambda package: tmp_path)
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(stories(0, 20), 320)
    for folder in ("shipped/small", "runs/mine/model"):
        tiny_model(4, vocab_size=320).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    assert shipped.tokenizer_of("small") == str(tmp_path / "shipped/small")
    assert shipped.tokenizer_of("runs/mine/") == "runs/mine/model"
    tokenizer.save_pretrained(tmp_path / "small")
    (tmp_path / "tokenizer.json").touch()
    for name in (
        "small",
        "./small/",
        "runs/mine/model/",
        "tokenizer.json",
        "owner/model",
        "owner/model:a.gguf",
    ):
        assert shipped.tokenizer_of(name) == name
