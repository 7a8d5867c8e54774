"""If a package of an extra is missing, the message says what to install."""

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
    """The requirements of each extra in pyproject.toml. (Python 3.10 has no TOML parser.)"""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    entries = re.findall(r"^(\w+) = (\[.*?\])$", table, re.MULTILINE | re.DOTALL)
    return {name: ast.literal_eval(values) for name, values in entries}


def required_packages():
    """Packages that any call of `require` or `not_installed` names."""
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("require", "not_installed"):
                yield from (
                    argument.value for argument in node.args[1:] if isinstance(argument, ast.Constant)
                )


def test_only_missing_packages_are_named():
    require("the report", "matplotlib", "prometheus-client")
    with pytest.raises(InputError, match=r"^it needs no-a, which is not installed: pip install no-a$"):
        require("it", "no-a", "numpy")
    with pytest.raises(
        InputError, match=r"^it needs no-a and no-b, .* not installed: pip install no-a no-b$"
    ):
        require("it", "no-a", "numpy", "no-b")


def test_required_packages_are_in_an_extra():
    in_extras = {
        re.split(r"[<>=; ]", line)[0] for name, lines in extras().items() if name != "dev" for line in lines
    }
    required = set(required_packages())
    assert {"peft", "matplotlib", "uvicorn", "lm-eval"} <= required <= in_extras


def test_no_message_installs_calm_from_an_index():
    """It is not on PyPI."""
    for file in [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.md")]:
        assert not re.search(r"pip install [\"']?calm-lm", file.read_text(encoding="utf-8")), file


def test_the_harness_without_lm_eval_is_one_sentence():
    """In another process, since calm.harness imports lm_eval at its top."""
    sentence = str(not_installed("the harness", "lm-eval"))
    as_program = "import runpy; runpy.run_module('calm.harness', run_name='__main__')"
    for program, code, message in (
        (as_program, 2, f"calm: error: {sentence}\n"),
        ("import calm.harness", 1, f"InputError: {sentence}\n"),
    ):
        command = [sys.executable, "-c", HIDDEN + program]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code and done.stderr.endswith(message)
        assert code == 1 or done.stderr == message
