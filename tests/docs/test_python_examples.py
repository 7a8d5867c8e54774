"""The Python examples of each page run, one after another, in an empty folder."""

import sys
from pathlib import Path

import pytest
from docs_pages import PAGES, examples_of, name_of
from serving_client import serving

from calm.data import formats
from calm.models.generation import sampler_registry
from calm.models.heads import registry
from calm.models.loading import load_model_and_tokenizer
from calm.training import optimizers

REGISTRIES = [
    (registry, "_REGISTRY"),
    (sampler_registry, "_SAMPLERS"),
    (formats, "FORMATS"),
    (optimizers, "_BUILDERS"),
]
SERVER = "http://127.0.0.1:8000"  # The address of `calm serve` on the pages.


def python_of(page):
    return [example for example in examples_of(page) if example.language == "python" and not example.reason]


@pytest.fixture
def module(request, monkeypatch):
    """A new module for the examples of a page, so that classes in them can be pickled.

    Whatever they register is removed afterwards.
    """
    for owner, name in REGISTRIES:
        monkeypatch.setattr(owner, name, dict(getattr(owner, name)))
    name = f"examples_of_{Path(request.node.callspec.id).stem}"
    module = sys.modules[name] = type(sys)(name)
    yield module
    del sys.modules[name]


def run(page, example, names, server=SERVER):
    # Start with empty lines, so that tracebacks have the page's line numbers.
    code = "\n" * example.line + example.text.replace(SERVER, server)
    exec(compile(code, page, "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=name_of)
def test_python_examples_run(page, module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for example in python_of(page):
        if SERVER in example.text:
            with serving(*load_model_and_tokenizer("stories"), name="model") as (_, _, url):
                run(page, example, vars(module), url)
        else:
            run(page, example, vars(module))


def test_every_guide_has_an_example_that_runs():
    guides = {page for page in PAGES if page.parent.name == "guides" and page.stem != "index"}
    assert len(guides) >= 8
    assert all(python_of(page) for page in guides)
