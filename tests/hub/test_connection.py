"""The hub where it does not answer: one brief question, and then what is in the cache."""

import threading
from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub import constants
from tiny import tiny_model

from calm.data.rows import load_hub_dataset
from calm.data.tokenizer import load_tokenizer
from calm.errors import InputError
from calm.hub import connection as hub
from calm.models.loading import load_language_model_and_tokenizer, load_model


@pytest.fixture
def online(monkeypatch):
    """As without HF_HUB_OFFLINE. A test says how the hub answers; there is no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_remembered", {})
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    asked = []

    def answers(answer):
        def head(address, **settings):
            asked.append(address)
            return answer()

        monkeypatch.setattr(hub, "get_session", lambda: SimpleNamespace(head=head))
        return asked

    return answers


def refuse():
    raise OSError("no route\nto it")


@pytest.mark.parametrize("status", [200, 302, 401, 404])
def test_any_answer_is_an_answer(online, status):
    online(lambda: SimpleNamespace(status_code=status))
    assert hub.why_unreachable() is None
    with hub.hub_or_cache():
        assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_why_it_cannot_be_reached(online, monkeypatch):
    host = constants.ENDPOINT.removeprefix("https://")
    asked = online(refuse)
    assert hub.why_unreachable() == f"{host} cannot be reached: no route"
    assert hub.why_unreachable() is not None and asked == [constants.ENDPOINT], "it is remembered"
    monkeypatch.setattr(hub, "_remembered", {})
    online(lambda: SimpleNamespace(status_code=503))
    assert hub.why_unreachable() == f"{host} cannot be reached: status 503"


def test_a_silent_network_is_not_waited_for(online, monkeypatch):
    released = threading.Event()
    online(lambda: released.wait(60) and refuse())
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.05")
    assert "did not answer within 0.05 s; set HF_HUB_ETAG_TIMEOUT" in hub.why_unreachable()
    released.set()


def test_a_mirror_is_asked_by_the_hubs_own_client(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "_remembered", {})
    assert hub.why_unreachable().startswith("127.0.0.1:9 cannot be reached: ")


def test_who_works_offline_is_not_asked_for(online, monkeypatch):
    asked = online(refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.why_unreachable() is None and not asked


def test_without_a_hub_libraries_read_their_caches(online):
    online(refuse)
    with hub.hub_or_cache():
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    with pytest.raises(ConnectionError, match="cannot be reached: no route"), hub.hub_or_cache():
        raise FileNotFoundError("not in the cache")
    with pytest.raises(ValueError, match="of its own"), hub.hub_or_cache():
        raise ValueError("of its own")
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_a_model_in_the_cache_is_loaded_without_a_hub(online, tmp_path):
    online(refuse)
    model = tiny_model()
    place = tmp_path / "models--me--small"
    model.save_pretrained(place / "snapshots/abc")
    (place / "refs").mkdir()
    (place / "refs/main").write_text("abc")
    loaded = load_model("me/small", cache_dir=str(tmp_path))
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("load", [load_language_model_and_tokenizer, load_tokenizer, load_hub_dataset])
def test_everything_that_the_hub_has_fails_alike(online, load):
    asked = online(refuse)
    with pytest.raises(InputError, match=r"nobody/nothing.*cannot be reached: no route\)"):
        load("nobody/nothing")
    assert len(asked) == 1


@pytest.mark.parametrize("load", [load_language_model_and_tokenizer, load_tokenizer, load_hub_dataset])
def test_what_looks_like_a_path_is_not_asked_for(online, load, tmp_path, monkeypatch):
    asked = online(refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("./small", "../me/small", "~/small", "/me/small", "me/small/model", "runs/small", "a b"):
        with pytest.raises(InputError, match=r"there is no .*folder"):
            load(name)
    assert not asked


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("gpt2", True), ("me/small", True), ("me/", False), ("", False), ("a:b", False), ("m" * 300, False)],
)
def test_names_on_the_hub(name, is_one):
    assert hub.is_hub_name(name) == is_one
