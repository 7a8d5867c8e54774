"""The wheel contains the package and nothing else, and works where only the wheel is installed.

`make wheels` installs it with each extra, which needs a network.
"""

import email
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # Built from the source distribution, as for a release, so that must be complete too.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("calm_lm-*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_contains_the_source_tree_and_nothing_else(wheel):
    source = ROOT / "src"
    tree = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    ours = {path.as_posix() for path in tree if not re.search(r"__pycache__|\.egg-info", str(path))}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == ours
    assert {"calm/py.typed", "calm/data/plots.txt", "calm/recipes/demo.yaml", "calm_command.py"} <= names
    assert [name for name in names if name.startswith("calm/serving/page/")]


def test_the_wheel_contains_the_license(wheel, metadata):
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("licenses/LICENSE"))
    assert zipfile.ZipFile(wheel).read(name) == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "MIT"


def test_the_source_distribution_has_no_tests(wheel):
    (path,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in names if name.startswith("tests")]
    assert {"CITATION.cff", "LICENSE", "constraints.txt", "pyproject.toml", "src/calm/py.typed"} <= names


def test_the_pinned_versions_satisfy_every_extra(metadata):
    """Whether an index has them is not tested."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition(";")[0].strip().split("==") for line in lines]
    pinned = {canonicalize_name(name): version for name, version in pins}
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    markers = " ".join(str(requirement.marker) for requirement in needed)
    for extra in ("cluster", "docs", "finetune", "harness", "report", "serve", "tensorboard"):
        assert extra in metadata.get_all("Provides-Extra") and f'extra == "{extra}"' in markers
    for requirement in needed:
        if requirement.name not in ("calm-lm", "setuptools"):  # Not pinned: itself, and a build tool.
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def test_the_shipped_model_is_small_and_has_a_card(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = "calm/shipped/stories/"
        assert archive.getinfo(folder + "model.safetensors").file_size < 16_000_000
        card = archive.read(folder + "README.md").decode()
    for text in ("license: mit", "BrierLM", "head_type: sequential", "calm share"):
        assert text in card, text


def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)  # Test what is installed, not this checkout.
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
    folder, count = out.split()
    assert folder == str(Path(site) / "calm")
    assert int(count) == len(list((ROOT / "src/calm/recipes").glob("*.yaml")))
    help_command = [python, "-X", "importtime", tmp_path / "env/bin/calm", "--help"]
    done = subprocess.run(help_command, capture_output=True, text=True, check=True, cwd=tmp_path)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "train" in done.stdout and "calm.cli" in imported and "torch" not in imported
    write = [tmp_path / "env/bin/calm", "generate", "stories", "Once upon a time", "--max_new_tokens", "24"]
    text = subprocess.run(
        [*write, "--seed", "1"], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert text.startswith("Once upon a time") and len(text.split()) > 15
