"""`calm serve` as a process: it prints its address, answers, and shuts down; mistakes are one sentence."""

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import openai
import pytest
from toy import failure

from calm.serving.run import _browser_host, _read_key, _url
from calm.serving.watch import _encodings


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_serves_and_shuts_down_on_a_signal(stop_signal, folder):
    environment = {**os.environ, "CALM_API_KEY": "k"}
    command = [sys.executable, "-m", "calm", "serve", str(folder), "--port", "0", "--temperature", "1"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        address = re.fullmatch(r"serving 'small' at (http://127\.0\.0\.1:\d+/v1)\n", line)
        assert address, line
        assert process.stdout.readline() == f"playground: {address[1].removesuffix('v1')}\n"
        assert httpx.get(address[1].removesuffix("v1")).status_code == 200, "without the key"
        client = openai.OpenAI(base_url=address[1], api_key="k")
        response = client.completions.create(model="small", prompt="One day", max_tokens=8)
        assert response.usage.completion_tokens == 8
        process.send_signal(stop_signal)
        _, errors = process.communicate(timeout=20)
        assert process.returncode in (0, -stop_signal, 128 + stop_signal), errors
        assert "Traceback" not in errors, errors
    finally:
        process.kill()


@pytest.mark.parametrize(
    "raw",
    ["k\u00e4y".encode(), b"k\xe4y", "\ufeffk\u00e4y\r\n".encode(), "k\u00e4y\n".encode("utf-16")],
    ids=["utf-8", "latin-1", "with a byte order mark", "utf-16"],
)
def test_key_file_is_read_in_any_encoding(raw, tmp_path):
    (tmp_path / "key").write_bytes(raw)
    key = _read_key(str(tmp_path / "key"))
    assert _encodings(key) & {b"k\xe4y", "k\u00e4y".encode()}


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8"),
        ("::1", "http://[::1]:8"),
        ("0.0.0.0", "http://127.0.0.1:8"),
        ("::", "http://[::1]:8"),
        ("", "http://localhost:8"),
        ("calm.lan", "http://calm.lan:8"),
    ],
)
def test_printed_url_can_be_opened_in_a_browser(host, url):
    assert _url(_browser_host(host), 8) == url


def test_mistakes_are_reported_in_one_sentence(folder, capsys, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}" in failure(capsys, "serve", folder, "--port", port)
    assert "port 99999" in failure(capsys, "serve", folder, "--port", 99999)
    for host in ("bad..name", f"{'a' * 70}.b"):  # Python refuses to encode these.
        assert f"cannot listen on {host}, port" in failure(capsys, "serve", folder, "--host", host)
    assert "max_rows must be above 0, got 0" in failure(capsys, "serve", folder, "--max_rows", 0)
    assert "must be above 0, got -1" in failure(capsys, "serve", folder, "--header_seconds=-1")
    assert "prefix_bytes must be above 0, got -1" in failure(capsys, "serve", folder, "--prefix_bytes=-1")
    message = failure(capsys, "serve", folder, "--prefix_bytes", 0, "--max_rows", 0)
    assert "max_rows" in message and "prefix_bytes" not in message
    assert "temperature must lie between 0 and 1" in failure(capsys, "serve", folder, "--temperature", 2)
    assert "cannot be read" in failure(capsys, "serve", folder, "--api_key_file", tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    assert "is empty" in failure(capsys, "serve", folder, "--api_key_file", tmp_path / "empty")
    assert "there is no model" in failure(capsys, "serve", tmp_path)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "needs uvicorn, which is not installed: pip install uvicorn" in failure(capsys, "serve", folder)
