"""A killed `calm prepare` resumes where it stopped, and reuses no stale or damaged work."""

import json
import signal

import datasets
import pyarrow
import pytest
from processes import start

from calm.data import pieces, reading
from calm.data.caching import load_or_make
from calm.data.formats import FORMATS, Format
from calm.data.prepare import prepare
from calm.data.prepared import is_prepared, load_prepared
from calm.data.stories import stories
from calm.errors import InputError

# `calm prepare` in small pieces, which kills itself after the second call of a function.
PROGRAM = """
import os, signal, sys
from calm.data import pieces, prepare, sources

pieces._DOCUMENTS_PER_PIECE, sources._GROUP_BYTES_PER_PROCESS = 25, 1
name = {"save": "asdict"}.get(sys.argv[1], "load_or_make")
module = {"read": sources, "tokenize": pieces, "save": prepare}[sys.argv[1]]
function, calls = getattr(module, name), []

def counted(*arguments, **settings):
    result = function(*arguments, **settings)
    calls.append(name)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(module, name, counted)
from calm.cli import main
main(["prepare", *sys.argv[2:], "--vocab_size", "300", "--num_proc", "1"])
"""


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(4):
        lines = [json.dumps({"text": story}) + "\n" for story in stories(number, 20)]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


def prepared(text, output, **settings):
    return prepare([str(text)], output, **({"vocab_size": 300, "num_proc": 1} | settings))


def tokens(data):
    return list(data.train["input_ids"]), list(data.validation["input_ids"])


def count_calls(monkeypatch, module, name):
    calls, function = [], getattr(module, name)

    def counted(*arguments, **settings):
        calls.append(arguments)
        return function(*arguments, **settings)

    monkeypatch.setattr(module, name, counted)
    return calls


def count_readings(monkeypatch):
    """Record each JSON-lines file that is read."""
    calls = count_calls(monkeypatch, reading, "documents_of_json_lines")
    monkeypatch.setitem(FORMATS, ".jsonl", Format(reading.documents_of_json_lines))
    return calls


@pytest.mark.parametrize("killed_during", ["read", "tokenize", "save"])
def test_killed_preparation_resumes(killed_during, text, tmp_path, small_pieces, monkeypatch):
    output, work = tmp_path / "out", tmp_path / ".out.work"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    result = start(killed_during, text, "--output", output, program=program).wait()
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not output.exists() and not is_prepared(output)
    num_read = len(list(work.glob("generator/*/*/*.arrow")))
    token_files = list(work.glob("tokens-*/*.arrow"))
    assert (num_read, len(token_files)) == {"read": (2, 0), "tokenize": (4, 2), "save": (4, 5)}[killed_during]

    readings = count_readings(monkeypatch)
    encodings = count_calls(monkeypatch, pieces, "encode_documents")
    data = prepared(text, output)
    assert len(readings) == 4 - num_read
    assert len(encodings) == 5 - len(token_files)  # Of 78 training and 2 held-out documents.
    assert tokens(data) == tokens(prepared(text, tmp_path / "another"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "out", "program.py", "text"]


def test_files_read_before_a_bad_one_are_not_read_again(text, tmp_path, small_pieces, monkeypatch):
    good = (text / "2.jsonl").read_text()
    (text / "2.jsonl").write_text(good + "{\n")
    with pytest.raises(InputError, match=r"2\.jsonl', line 21.*kept in '.*\.out\.work'"):
        prepared(text, tmp_path / "out")
    (text / "2.jsonl").write_text(good)
    readings = count_readings(monkeypatch)
    data = prepared(text, tmp_path / "out")
    assert len(readings) == 2
    assert tokens(data) == tokens(prepared(text, tmp_path / "another"))


def test_failure_in_the_first_file_leaves_no_work_behind(text, tmp_path, small_pieces):
    (text / "0.jsonl").write_text('{"text": "good"}\n{\n')
    with pytest.raises(InputError, match=r"fix that line\.$"):
        prepared(text, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize("change", ["text", "vocab_size", "seed", "tokenizer"])
def test_stale_work_is_not_reused(change, text, tmp_path, small_pieces, monkeypatch):
    """Work on other text or with other settings does not count."""
    monkeypatch.setattr(pieces.shutil, "rmtree", lambda *_, **__: None)  # Keeps all pieces of the first run.
    prepared(text, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "first")
    assert list((tmp_path / ".out.work").glob("tokens-*/*.arrow"))
    settings = {"vocab_size": {"vocab_size": 320}, "seed": {"seed": 5}}.get(change, {})
    if change == "text":
        (text / "1.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in stories(9, 20)))
    if change == "tokenizer":
        settings = {"tokenizer": str(tmp_path / "first/tokenizer")}
    data = prepared(text, tmp_path / "out", **settings)
    assert tokens(data) == tokens(prepared(text, tmp_path / "another", **settings))
    assert (tokens(data) == tokens(load_prepared(tmp_path / "first"))) == (change == "tokenizer")


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def unmark(file):
    """As if its writer had been killed before it wrote the checksum."""
    file.with_name(f"{file.name}.sum").unlink()


@pytest.mark.parametrize("pieces_of", ["tokens-*/*.arrow", "generator/*/*/*.arrow"])
@pytest.mark.parametrize("damage", [flip_a_bit, halve, unmark])
def test_damaged_piece_is_rebuilt(damage, pieces_of, text, tmp_path, small_pieces, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(pieces.shutil, "rmtree", lambda *_, **__: None)
        expected = tokens(prepared(text, tmp_path / "out"))
    (tmp_path / "out").rename(tmp_path / "first")
    for piece in sorted((tmp_path / ".out.work").glob(pieces_of))[1:3]:
        damage(piece)
    assert tokens(prepared(text, tmp_path / "out")) == expected
    assert "that are damaged or incomplete; rebuilding them" in caplog.text


def test_error_without_a_damaged_piece_is_raised(tmp_path):
    """No second attempt, and no file removed: the cached ones are intact."""
    dataset = datasets.Dataset.from_dict({"n": [1]})
    file = str(tmp_path / "a.arrow")
    load_or_make(lambda: dataset.map(dict, cache_file_name=file), tmp_path, "numbers")

    def fail():
        raise pyarrow.ArrowInvalid("of its own")

    with pytest.raises(pyarrow.ArrowInvalid, match="of its own"):
        load_or_make(fail, tmp_path, "numbers")
    assert (tmp_path / "a.arrow").is_file()
