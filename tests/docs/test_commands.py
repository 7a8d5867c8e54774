"""The commands on the pages are valid; those of the first guide run."""

import re
import shlex

import pytest
from docs_pages import PAGES, ROOT, examples_of, name_of
from toy import TOY

from calm import cli
from calm.data.stories import write_stories

# Recipes that the reader is to write.
READER_RECIPES = ("my.yaml", "MINE.yaml", "seed2.yaml")


def commands_of(page):
    """The arguments of each `calm ...` in the console blocks of a page."""
    commands = []
    for example in examples_of(page):
        if example.language == "console" and not example.reason:
            lines = example.text.replace("\\\n", " ").splitlines()
            words = [shlex.split(line, comments=True) for line in lines]
            commands += [words[1:] for words in words if words[:1] == ["calm"]]
    return commands


PAGES_WITH_COMMANDS = [page for page in [*PAGES, ROOT / "README.md"] if commands_of(page)]


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=name_of)
def test_commands_on_the_pages_are_valid(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in READER_RECIPES:
        (tmp_path / name).write_text(TOY)
    (tmp_path / "runs/a").mkdir(parents=True)  # A run that a command resumes.
    (tmp_path / "runs/a/recipe.yaml").write_text(TOY)
    (tmp_path / "src").symlink_to(ROOT / "src")  # Some commands need a clone.
    for command in commands_of(page):
        cli._parse(command[0], command)


def test_the_first_guide_runs_from_text_to_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(TOY)
    write_stories(tmp_path / "my_texts" / "stories.jsonl", seed=3, num_stories=60)
    for command in commands_of(ROOT / "docs/guides/your_text.md"):
        cli.main(["toy.yaml" if word == "laptop_quick" else word for word in command])
    assert (tmp_path / "runs/compare/report.html").is_file()
    assert "BrierLM" in capsys.readouterr().out


def test_the_page_of_commands_lists_all_of_them(capsys):
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    cli.main(["--help"])
    known = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(re.findall(r"^\| `calm (\w+)`", page, re.MULTILINE)) == sorted(known)
