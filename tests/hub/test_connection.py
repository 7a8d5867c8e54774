"""A hub that does not answer: one brief request, then only the cache is used."""

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
def fake_hub(monkeypatch):
    """Sets how a hub without a network answers; returns the list of requests. HF_HUB_OFFLINE is off."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_remembered", {})
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    requests = []

    def answer_with(answer):
        def head(address, **settings):
            requests.append(address)
            return answer()

        monkeypatch.setattr(hub, "get_session", lambda: SimpleNamespace(head=head))
        return requests

    return answer_with


def refuse():
    raise OSError("no route\nto it")


@pytest.mark.parametrize("status", [200, 302, 401, 404])
def test_any_answer_but_a_gateway_error_means_reachable(fake_hub, status):
    fake_hub(lambda: SimpleNamespace(status_code=status))
    assert hub.why_unreachable() is None
    with hub.hub_or_cache():
        assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_reason_for_an_unreachable_hub_is_remembered(fake_hub, monkeypatch):
    host = constants.ENDPOINT.removeprefix("https://")
    requests = fake_hub(refuse)
    assert hub.why_unreachable() == f"{host} cannot be reached: no route"
    assert hub.why_unreachable() is not None and requests == [constants.ENDPOINT], "it is remembered"
    monkeypatch.setattr(hub, "_remembered", {})
    fake_hub(lambda: SimpleNamespace(status_code=503))
    assert hub.why_unreachable() == f"{host} cannot be reached: status 503"


def test_silent_network_times_out(fake_hub, monkeypatch):
    released = threading.Event()
    fake_hub(lambda: released.wait(60) and refuse())
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.05")
    assert "did not answer within 0.05 s; set HF_HUB_ETAG_TIMEOUT" in hub.why_unreachable()
    released.set()


def test_mirror_is_asked_with_the_hubs_own_client(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "_remembered", {})
    assert hub.why_unreachable().startswith("127.0.0.1:9 cannot be reached: ")


def test_offline_mode_sends_no_request(fake_hub, monkeypatch):
    requests = fake_hub(refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.why_unreachable() is None and not requests


def test_libraries_read_their_caches_if_the_hub_is_unreachable(fake_hub):
    fake_hub(refuse)
    with hub.hub_or_cache():
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    with pytest.raises(ConnectionError, match="cannot be reached: no route"), hub.hub_or_cache():
        raise FileNotFoundError("not in the cache")
    with pytest.raises(ValueError, match="of its own"), hub.hub_or_cache():
        raise ValueError("of its own")
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_cached_model_loads_without_a_hub(fake_hub, tmp_path):
    fake_hub(refuse)
    model = tiny_model()
    cached = tmp_path / "models--me--small"
    model.save_pretrained(cached / "snapshots/abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    loaded = load_model("me/small", cache_dir=str(tmp_path))
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("load", [load_language_model_and_tokenizer, load_tokenizer, load_hub_dataset])
def test_all_loaders_report_an_unreachable_hub_alike(fake_hub, load):
    requests = fake_hub(refuse)
    with pytest.raises(InputError, match=r"nobody/nothing.*cannot be reached: no route\)"):
        load("nobody/nothing")
    assert len(requests) == 1


@pytest.mark.parametrize("load", [load_language_model_and_tokenizer, load_tokenizer, load_hub_dataset])
def test_names_that_look_like_paths_send_no_request(fake_hub, load, tmp_path, monkeypatch):
    requests = fake_hub(refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("./small", "../me/small", "~/small", "/me/small", "me/small/model", "runs/small", "a b"):
        with pytest.raises(InputError, match=r"there is no .*folder"):
            load(name)
    assert not requests


@pytest.mark.parametrize(
    ("name", "is_valid"),
    [("gpt2", True), ("me/small", True), ("me/", False), ("", False), ("a:b", False), ("m" * 300, False)],
)
def test_valid_names_on_the_hub(name, is_valid):
    assert hub.is_hub_name(name) == is_valid
