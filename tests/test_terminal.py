"""Closed pipes and streams, full disks and old encodings never cause a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from calm.errors import InputError
from calm.terminal import CLOSED_PIPE, as_text

SOURCE = Path(__file__).parents[1] / "src"
COMMAND = ("-c", "from calm_command import main; main()")
HELP, MISTAKE = (*COMMAND, "--help"), (*COMMAND, "trian")
TABLE = (
    "-c",
    "from calm.cli import main; import calm.cli as cli; from rich.console import Console\n"
    "cli._run = lambda arguments: Console().print('a table')\nmain()",
)
posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")


def run(*arguments: str, **settings) -> subprocess.CompletedProcess:
    without_torch = "import calm_command; calm_command.is_running = True\n"  # Faster.
    arguments = tuple(
        without_torch + part if arguments[i - 1] == "-c" else part for i, part in enumerate(arguments)
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), **settings.pop("environment", {})}
    return subprocess.run([sys.executable, *arguments], env=environment, timeout=60, **settings)


def closed_pipe() -> int:
    """The write end of a pipe whose read end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("arguments", [HELP, ("-u", *HELP), TABLE, ("-u", *TABLE)])
def test_output_to_a_closed_pipe_ends_quietly(arguments):
    done = run(*arguments, stdout=closed_pipe(), stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, b"")


@pytest.mark.parametrize("arguments", [MISTAKE, ("-u", *MISTAKE)])
def test_messages_to_a_closed_pipe_end_quietly(arguments):
    done = run(*arguments, stderr=closed_pipe(), stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (CLOSED_PIPE, b"")


@posix
@pytest.mark.parametrize(("arguments", "code"), [(HELP, 0), (TABLE, 0), (MISTAKE, 2)])
def test_closed_streams_do_not_change_the_exit_code(arguments, code):
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, *arguments]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(SOURCE)}).returncode == code


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, as on Linux")
def test_a_full_disk_is_one_sentence():
    with Path("/dev/full").open("wb") as full:
        done = run(*HELP, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "calm: error: the output could not be written (No space left on device).\n"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", b"54.3?0.2 ? ? caf?"),
        ("cp1252", b"54.3\xb10.2 ? ? caf\xe9"),
        ("utf-8", "54.3±0.2 → 🎈 café".encode()),
        ("ascii:backslashreplace", b"54.3\\xb10.2 \\u2192 \\U0001f388 caf\\xe9"),
        ("ascii:surrogateescape", b"54.3?0.2 ? ? caf?"),
    ],
)
def test_characters_that_an_encoding_lacks_are_replaced(encoding, expected):
    code = "import calm.cli as cli\ncli._run = lambda arguments: print('54.3±0.2 → 🎈 café')\ncli.main()"
    environment = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = run("-c", code, environment=environment, capture_output=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, expected, b"")


def test_recipes_are_utf_8_in_any_locale(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("data: {separator: '→ é'}\n".encode())
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    command = ("-m", "calm", "train", "--recipe", str(tmp_path / "mine.yaml"))
    done = run(*command, "--print_config=skip_default", environment=environment, capture_output=True)
    assert yaml.safe_load(done.stdout.decode()) == {"data": {"separator": "→ é"}}


def test_texts_with_surrogate_escapes_are_read_as_utf_8():
    assert as_text("Größe 🎈") == "Größe 🎈"
    assert as_text("Größe".encode().decode("ascii", "surrogateescape")) == "Größe"
    with pytest.raises(InputError, match="is not UTF-8"):
        as_text(b"Gr\xf6\xdfe".decode("ascii", "surrogateescape"))
