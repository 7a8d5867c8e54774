"""`import calm` makes the models known to the Auto classes everywhere but in the console script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
PRINTING_REGISTRATION = """
import sys, types
sys.modules["calm.models.registration"] = types.SimpleNamespace(register=lambda: print("registered"))
"""
SPAWNS = """
import multiprocessing, sys
import calm
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=print)
    process.start()
    process.join()
"""


@pytest.fixture
def run(tmp_path):
    """Run Python in a folder with packages, where registration only prints that it was called."""
    (tmp_path / "sitecustomize.py").write_text(PRINTING_REGISTRATION)
    for name, init in (("with_train", ""), ("calm_tools", "import calm")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(init)
        (tmp_path / name / "__main__.py").write_text("")
        (tmp_path / name / "train.py").write_text("import calm")
    (tmp_path / "script.py").write_text("import calm.errors")
    (tmp_path / "spawn.py").write_text(SPAWNS)

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(SOURCE)])}
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
        ).stdout

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import calm"),
        ("-c", "import calm_command, calm"),
        ("script.py",),
        ("-m", "with_train.train"),
        ("-m", "calm_tools"),
        ("-m", "calm_tools.train"),
        ("-Xutf8", "-W", "ignore", "-Bm", "with_train.train", "-m", "calm"),
        ("-m", "calm.errors"),
        ("script.py", "-m", "calm"),
        ("-m", "calm", "--version"),
    ],
)
def test_every_program_registers_the_models(run, arguments):
    assert run(*arguments).splitlines()[0] == "registered"


def test_spawned_processes_register_the_models(run):
    assert run("spawn.py").split() == ["registered", "registered"]


def test_console_script_does_not_register_the_models(run):
    out = run("-c", "import calm_command; calm_command.main()", "--version")
    assert out.startswith("calm ") and "registered" not in out
