"""The API reference lists every public name, and its docstrings fit the signatures."""

import logging
import re

import griffe
import pytest
from docs_pages import ROOT

import calm

PAGES = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md")}
MODULES = sorted({name for text in PAGES.values() for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)})


@pytest.fixture(scope="module")
def package():
    return griffe.load("calm", search_paths=[ROOT / "src"], docstring_parser="google")


def public_members(owner):
    """Public classes and functions that are defined here, and the members of these classes."""
    for name, member in owner.members.items():
        if not name.startswith("_") and not member.is_alias and (member.is_class or member.is_function):
            yield member
            if member.is_class:
                yield from public_members(member)


def test_the_reference_lists_every_public_name():
    listed = set(re.findall(r"^\| \[`(\w+)`\]", PAGES["index"], re.MULTILINE))
    assert listed == {name for name in calm.__all__ if not name.startswith("__")}


def test_the_reference_links_each_name_to_its_module(package):
    for name, path in re.findall(r"\[`(\w+)`\]\(\w+\.md#(calm\.[\w.]+)\)", PAGES["index"]):
        assert path.rpartition(".")[0] in MODULES
        assert package[path.removeprefix("calm.")].name == name == getattr(calm, name).__name__


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_exist_and_fit_their_signatures(package, name, caplog):
    module = package[name.removeprefix("calm.")]
    missing = [member.path for member in [module, *public_members(module)] if member.docstring is None]
    assert not missing
    with caplog.at_level(logging.WARNING):
        for member in public_members(module):
            # Classes may document fields that griffe does not find, as of configurations and named tuples.
            if member.is_function:
                member.docstring.parse()
    assert not caplog.messages
