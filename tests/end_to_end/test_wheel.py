"""The built wheel holds recipes, plots and py.typed, and works where only the wheel is installed."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (path,) = folder.glob("calm_lm-*.whl")
    return path


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {path.name for path in (ROOT / "src/calm/recipes").glob("*.yaml")}
    assert shipped
    assert {f"calm/recipes/{name}" for name in shipped} <= set(names)
    assert {f"calm/report/templates/{name}" for name in ("page.html", "page.css", "run.html")} <= set(names)
    assert {"calm/py.typed", "calm/data/plots.txt", "calm/__main__.py", "calm_command.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "src"))]


def test_the_model_of_the_package_is_small_and_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = "calm/shipped/stories/"
        assert archive.getinfo(folder + "model.safetensors").file_size < 16_000_000
        card = archive.read(folder + "README.md").decode()
    for said in ("license: mit", "BrierLM", "head_type: sequential", "calm share"):
        assert said in card, said


def test_installs_in_an_empty_environment(wheel, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)  # What is installed is tried, not this checkout.
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    # The dependencies come from the environment of the tests; calm itself only from the wheel.
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    outside = sysconfig.get_path("purelib")
    (Path(site) / "dependencies.pth").write_text(outside + "\n")
    code = (
        "import calm, pathlib; from calm.training.recipe_files import read_recipe;"
        " from calm.training.recipe_settings import shipped_recipes;"
        "from calm.data.stories import stories; next(stories(0));"
        "[read_recipe(name) for name in shipped_recipes()];"
        "print(pathlib.Path(calm.__file__).parent, len(shipped_recipes()))"
    )
    out = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    place, count = out.split()
    assert place == str(Path(site) / "calm")
    assert int(count) == len(list((ROOT / "src/calm/recipes").glob("*.yaml")))
    ask_for_help = [python, "-X", "importtime", tmp_path / "env/bin/calm", "--help"]
    done = subprocess.run(ask_for_help, capture_output=True, text=True, check=True, cwd=tmp_path)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "train" in done.stdout and "calm.cli" in imported and "torch" not in imported
    write = [tmp_path / "env/bin/calm", "generate", "stories", "Once upon a time", "--max_new_tokens", "24"]
    text = subprocess.run(
        [*write, "--seed", "1"], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert text.startswith("Once upon a time") and len(text.split()) > 15
