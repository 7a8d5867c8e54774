"""What the site builder does not check: links to pictures, files and pages, the menu, line lengths."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from docs_pages import PAGES, ROOT, name_of
from markdown.extensions.toc import slugify
from markdown_it import MarkdownIt

ROOT_PAGES = sorted(ROOT.glob("*.md"))


def tokens_of(page: Path) -> Iterator:
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def anchors_of(page: Path) -> set[str]:
    """The anchors of the headings of a page."""
    pairs = itertools.pairwise(tokens_of(page))
    headings = [after.content for token, after in pairs if token.type == "heading_open"]
    return {slugify(re.sub(r"[`*]", "", heading), "-") for heading in headings}


def links_of(page: Path) -> list[str]:
    """Relative addresses of links and pictures."""
    addresses = [token.attrs.get("href") or token.attrs.get("src") for token in tokens_of(page)]
    return [address for address in addresses if address and not re.match(r"[a-z]+:", address)]


def fault_of(page: Path, address: str) -> str | None:
    """What is wrong with a link of a page."""
    path, _, anchor = address.partition("#")
    target = (page.parent / path).resolve() if path else page
    if target.parent == ROOT / "docs/notebooks":  # Built from a notebook.
        target = ROOT / "examples/notebooks" / f"{target.stem}.ipynb"
    if not target.exists():
        return f"{address}: there is no such file"
    is_reference = target.parent == ROOT / "docs/api"  # Built from docstrings; the site builder checks it.
    if anchor and not is_reference and anchor not in anchors_of(target):
        return f"{address}: there is no such heading"
    return None


@pytest.mark.parametrize("page", [*PAGES, *ROOT_PAGES], ids=name_of)
def test_links_lead_somewhere(page):
    assert not [fault for address in links_of(page) if (fault := fault_of(page, address))]


def test_fault_of_finds_broken_links():
    page = ROOT / "docs/maths.md"
    assert fault_of(page, "gone.md") and fault_of(page, "#gone") and fault_of(page, "plots/gone.png")
    assert not fault_of(page, "heads.md#categorical-flow")


def pages_in(menu: object) -> Iterator[str]:
    if isinstance(menu, str):
        yield menu
    else:
        for entry in menu.values() if isinstance(menu, dict) else menu:
            yield from pages_in(entry)


def test_every_page_is_in_the_menu():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    notebooks = {f"notebooks/{path.stem}.md" for path in ROOT.glob("examples/notebooks/*.ipynb")}
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
    assert sorted(pages_in(menu)) == sorted(pages | notebooks)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_prose_has_at_most_120_characters_a_line(page):
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    too_long = [(i, line) for i, line in lines if len(line) > 120]
    assert not [i for i, line in too_long if not line.lstrip().startswith(("|", "!["))]
