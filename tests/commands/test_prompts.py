"""Prompts from a file, one per line."""

import io
import re

import pytest

from calm.commands.prompts import prompts_of
from calm.errors import InputError


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("lines.txt", "One\r\n\n  \nTwo, \x0c three\n", ["One", "Two, \x0c three"]),
        ("lines.txt", "\ufeffOne", ["One"]),
        ("lines.jsonl", '"One\\nline"\n{"prompt": "Two", "id": 7}\n', ["One\nline", "Two"]),
    ],
)
def test_file_has_one_prompt_per_line(tmp_path, name, content, prompts):
    (tmp_path / name).write_bytes(content.encode())
    assert prompts_of(["Zero"], str(tmp_path / name)) == ["Zero", *prompts]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lines.txt", b" \n\n", "there is no prompt"),
        ("lines.txt", b"caf\xe9", "not UTF-8"),
        ("lines.jsonl", b'"One"\n{"text": "Two"}', 'line 2 must be a string, or an object with a "prompt"'),
        ("lines.jsonl", b"One", "line 1 is not JSON"),
        ("lines.jsonl", rb'{"prompt": "\ud800"}', "is not UTF-8"),
        ("lines.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_unusable_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        prompts_of([], str(tmp_path / name))


def test_dash_reads_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Über\nTwo".encode())))
    assert prompts_of([], "-") == ["Über", "Two"]
