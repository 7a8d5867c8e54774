"""`calm prepare` that is killed goes on where it stopped, and takes nothing that does not belong to it."""

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
    """Files of JSON lines that are read."""
    calls = count_calls(monkeypatch, reading, "documents_of_json_lines")
    monkeypatch.setitem(FORMATS, ".jsonl", Format(reading.documents_of_json_lines))
    return calls


@pytest.mark.parametrize("where", ["read", "tokenize", "save"])
def test_what_is_killed_goes_on(where, text, tmp_path, small_pieces, monkeypatch):
    output, work = tmp_path / "out", tmp_path / ".out.work"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = start(where, text, "--output", output, program=program).wait()
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists() and not is_prepared(output)
    read = len(list(work.glob("generator/*/*/*.arrow")))
    kept = list(work.glob("tokens-*/*.arrow"))
    assert (read, len(kept)) == {"read": (2, 0), "tokenize": (4, 2), "save": (4, 5)}[where]

    lines = count_readings(monkeypatch)
    texts = count_calls(monkeypatch, pieces, "encode_documents")
    data = prepared(text, output)
    assert len(lines) == 4 - read
    assert len(texts) == 5 - len(kept)  # Of 78 training and 2 held-out documents.
    assert tokens(data) == tokens(prepared(text, tmp_path / "another"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "out", "program.py", "text"]


def test_a_bad_file_costs_itself_only(text, tmp_path, small_pieces, monkeypatch):
    good = (text / "2.jsonl").read_text()
    (text / "2.jsonl").write_text(good + "{\n")
    with pytest.raises(InputError, match=r"2\.jsonl', line 21.*kept in '.*\.out\.work'"):
        prepared(text, tmp_path / "out")
    (text / "2.jsonl").write_text(good)
    lines = count_readings(monkeypatch)
    data = prepared(text, tmp_path / "out")
    assert len(lines) == 2
    assert tokens(data) == tokens(prepared(text, tmp_path / "another"))


def test_nothing_done_leaves_nothing(text, tmp_path, small_pieces):
    (text / "0.jsonl").write_text('{"text": "good"}\n{\n')
    with pytest.raises(InputError, match=r"fix that line\.$"):
        prepared(text, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize("change", ["text", "vocab_size", "seed", "tokenizer"])
def test_stale_work_is_not_taken(change, text, tmp_path, small_pieces, monkeypatch):
    """What was begun with other text or settings is another's work."""
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
    """As if its writer had been killed before it was marked as finished."""
    file.with_name(f"{file.name}.sum").unlink()


@pytest.mark.parametrize("pieces_of", ["tokens-*/*.arrow", "generator/*/*/*.arrow"])
@pytest.mark.parametrize("damage", [flip_a_bit, halve, unmark])
def test_a_damaged_piece_is_made_anew(damage, pieces_of, text, tmp_path, small_pieces, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(pieces.shutil, "rmtree", lambda *_, **__: None)
        whole = tokens(prepared(text, tmp_path / "out"))
    (tmp_path / "out").rename(tmp_path / "first")
    for piece in sorted((tmp_path / ".out.work").glob(pieces_of))[1:3]:
        damage(piece)
    assert tokens(prepared(text, tmp_path / "out")) == whole
    assert "that are damaged or incomplete; rebuilding them" in caplog.text


def test_what_no_damaged_piece_explains_is_raised(tmp_path):
    """Not the same again: nothing that is kept is to blame."""
    whole = datasets.Dataset.from_dict({"n": [1]})
    file = str(tmp_path / "a.arrow")
    load_or_make(lambda: whole.map(dict, cache_file_name=file), tmp_path, "numbers")

    def fail():
        raise pyarrow.ArrowInvalid("of its own")

    with pytest.raises(pyarrow.ArrowInvalid, match="of its own"):
        load_or_make(fail, tmp_path, "numbers")
    assert (tmp_path / "a.arrow").is_file()
