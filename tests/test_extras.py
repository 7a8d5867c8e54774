"""What to install where a package of an extra is missing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from calm.errors import InputError
from calm.extras import not_installed, require

ROOT = Path(__file__).parents[1]
HIDDEN = "import sys; sys.modules['lm_eval'] = None; "


def extras():
    """Name of an extra -> what pyproject.toml says it brings. (Python 3.10 reads no TOML.)"""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    entries = re.findall(r"^(\w+) = (\[.*?\])$", table, re.MULTILINE | re.DOTALL)
    return {name: ast.literal_eval(values) for name, values in entries}


def packages_asked_for():
    """The packages that the code asks for, wherever it does."""
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("require", "not_installed"):
                yield from (one.value for one in node.args[1:] if isinstance(one, ast.Constant))


def test_the_missing_ones_are_named():
    require("the report", "matplotlib", "prometheus-client")
    with pytest.raises(InputError, match=r"^it needs no-a, which is not installed: pip install no-a$"):
        require("it", "no-a", "numpy")
    with pytest.raises(
        InputError, match=r"^it needs no-a and no-b, .* not installed: pip install no-a no-b$"
    ):
        require("it", "no-a", "numpy", "no-b")


def test_what_is_asked_for_is_what_the_extras_bring():
    brought = {
        re.split(r"[<>=; ]", line)[0] for name, lines in extras().items() if name != "dev" for line in lines
    }
    asked = set(packages_asked_for())
    assert {"peft", "matplotlib", "uvicorn", "lm-eval"} <= asked <= brought


def test_no_sentence_asks_for_what_no_index_has():
    for file in [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.md")]:
        assert not re.search(r"pip install [\"']?calm-lm", file.read_text(encoding="utf-8")), file


def test_the_harness_without_lm_eval_is_one_sentence():
    """Its module is the program, so it is tried in a process of its own."""
    sentence = str(not_installed("the harness", "lm-eval"))
    as_program = "import runpy; runpy.run_module('calm.harness', run_name='__main__')"
    for program, code, said in (
        (as_program, 2, f"calm: error: {sentence}\n"),
        ("import calm.harness", 1, f"InputError: {sentence}\n"),
    ):
        command = [sys.executable, "-c", HIDDEN + program]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code and done.stderr.endswith(said)
        assert code == 1 or done.stderr == said
