"""The fenced examples of the documentation, and why some are not run."""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in ROOT.glob("docs/**/*.md") if path.parent.name != "notebooks")
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Example:
    """A fenced block of a page: its language, text and first line, and the reason if it is not run."""

    language: str
    text: str
    line: int
    reason: str | None


def examples_of(page: Path) -> list[Example]:
    """The examples of a page. `<!-- not run: REASON -->` before an example excludes it."""
    examples, reason = [], None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            language = token.info.split(" ")[0]
            examples.append(Example(language, token.content, token.map[0] + 1, reason))
        match = _NOT_RUN.match(token.content) if token.type == "html_block" else None
        reason = match[1] if match else None
    return examples


def name_of(page: Path) -> str:
    """The name of a page in test ids."""
    return str(page.relative_to(ROOT))
