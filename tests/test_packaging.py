"""Files beside the package: the Docker image of the server, and the citation."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import calm
from calm.cli import _parse

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def hadolint():
    """Path of the linter of Dockerfiles, in the virtual environment or elsewhere; None if there is none."""
    return shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


@pytest.mark.skipif(hadolint() is None, reason="hadolint is not installed")
def test_the_linter_accepts_the_dockerfile():
    def lint(text):
        command = [hadolint(), "--no-color", "--format", "json", "-"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        return {fault["code"] for fault in json.loads(done.stdout)}

    assert lint(DOCKERFILE) == set()
    assert "DL3002" in lint(DOCKERFILE.replace("USER 10001", "USER root"))
    assert "DL3020" in lint(DOCKERFILE.replace("COPY", "ADD"))


def test_the_image_runs_a_valid_command():
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.MULTILINE)
    (command,) = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    program, *arguments = [*yaml.safe_load(entry), *yaml.safe_load(command)]
    settings = _parse(arguments[0], arguments)
    assert program == "calm" and settings["model"] == "/model" and settings["host"] == "0.0.0.0"
    assert f"EXPOSE {settings['port']}\n" in DOCKERFILE
    assert f"http://127.0.0.1:{settings['port']}/health" in DOCKERFILE


def test_docker_is_sent_only_what_it_builds_from():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines and sent == {"LICENSE", "README.md", "constraints.txt", "pyproject.toml", "src"}
    assert all((ROOT / name).exists() for name in sent)


def test_the_citation_is_complete_and_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    required = {"cff-version", "message", "title", "authors"}
    assert required <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == calm.__version__
    assert citation["license"] == "MIT"
    assert citation["authors"] == [{"name": "The calm developers"}]
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert "2510.27688" in paper["url"] and paper["url"] in (ROOT / "README.md").read_text(encoding="utf-8")
    assert importlib.metadata.metadata("calm-lm")["Author"] == "The calm developers"
