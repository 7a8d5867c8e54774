"""Type checkers know the public names, even in strict mode."""

import subprocess
import sys
import venv
from pathlib import Path

import calm

ROOT = Path(__file__).parents[1]
# To check torch and transformers as well would take most of a minute, and say nothing about calm.
SETTINGS = """[mypy]
strict = true
[mypy-torch.*,transformers.*]
follow_imports = skip
ignore_missing_imports = true
"""
PROGRAM = """
from calm import {names}
from calm.core.brier import NUM_ORDERS
from calm.models.loading import load_model_and_tokenizer
import calm

version: str = calm.__version__
score: float = brier_lm([0.1] * NUM_ORDERS)
sampler: ExactSampler | PoolSampler = PoolSampler(temperature=0.5)
model: CalmForCausalLM = load_model_and_tokenizer("stories")[0]
head: type[GenerativeHead] | type[HeadConfig] = HeadConfig
"""


def test_public_names_and_examples_pass_a_strict_type_check(tmp_path):
    """calm is installed in an environment, so that mypy reports errors of the program, not of calm."""
    venv.create(tmp_path / "env", with_pip=False)
    [site] = (tmp_path / "env").rglob("site-packages")
    (site / "calm.pth").write_text(f"{ROOT / 'src'}\n")
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    (tmp_path / "program.py").write_text(PROGRAM.format(names=", ".join(calm.__all__)))
    python = next(path for path in (tmp_path / "env").rglob("python*") if path.stem == "python")
    files = [tmp_path / "program.py", *(ROOT / "examples").glob("*.py")]
    command = [sys.executable, "-m", "mypy", "--python-executable", python, "--cache-dir", tmp_path / "cache"]
    done = subprocess.run([*map(str, [*command, *files])], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith("Success") and done.returncode == 0, done.stdout + done.stderr


def test_all_lists_every_public_name():
    assert set(calm.__all__) == {*calm._MODULES, "__version__"}
