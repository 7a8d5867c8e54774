"""The API reference has every public name, each with a docstring that fits its signature."""

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
    """Classes, functions and their public members, of what is defined here."""
    for name, member in owner.members.items():
        if not name.startswith("_") and not member.is_alias and (member.is_class or member.is_function):
            yield member
            if member.is_class:
                yield from public_members(member)


def test_the_reference_has_the_names_of_the_package():
    listed = set(re.findall(r"^\| \[`(\w+)`\]", PAGES["index"], re.MULTILINE))
    assert listed == {name for name in calm.__all__ if not name.startswith("__")}


def test_where_the_reference_says_names_are_they_are(package):
    for name, path in re.findall(r"\[`(\w+)`\]\(\w+\.md#(calm\.[\w.]+)\)", PAGES["index"]):
        assert path.rpartition(".")[0] in MODULES
        assert package[path.removeprefix("calm.")].name == name == getattr(calm, name).__name__


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_of_the_reference(package, name, caplog):
    module = package[name.removeprefix("calm.")]
    missing = [member.path for member in [module, *public_members(module)] if member.docstring is None]
    assert not missing
    with caplog.at_level(logging.WARNING):
        for member in public_members(module):
            # Classes describe fields, which come from elsewhere where they are configurations or tuples.
            if member.is_function:
                member.docstring.parse()
    assert not caplog.messages
