"""benchmarks/house.py measures a small made-up package correctly."""

import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.house import cycles_in, find_modules, imports_among, measure, table

CHECKOUT = Path(__file__).parents[1]
RUN = """\
    total = 0
    for one in values:
        if one > 3:
            total += one
        else:
            total -= one
    return total
"""
FILES = {
    "README.md": "# A house\n\nTwo rooms.\n",
    "setup.py": "not Python at all (",  # Beside the source: not read.
    "src/house/__init__.py": '"""A house."""\n',
    "src/house/kitchen.py": f'"""Where one cooks."""\n\ndef cook(values):\n    """Cook."""\n{RUN}',
    "src/house/cellar.py": (
        "import os\nfrom house.kitchen import cook\n\n"
        "class Cellar:\n    def fill(self, values):\n        # The same, deeper inside.\n"
        f"{RUN.replace('    ', '     ')}\n"
        "    def _hidden(self): pass\n"
        "    def store(self, a, b, /, c, d, e=1, *rest, f, g, h=2, **more): pass\n"
    ),
    "src/house/attic/__init__.py": "",
    "src/house/attic/box.py": "from . import lid\nfrom ..cellar import Cellar\n",
    "src/house/attic/lid.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.attic.box import Cellar\n"
    ),
    "src/house/_private.py": "def nobody_counts_this(): pass\n",
    "src/house.egg-info/old.py": "x = 1\n",
    "src/build/copy.py": "x = 1\n",
}


@pytest.fixture
def house(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_figures_of_a_small_package(house):
    figures = measure(house).figures()
    sizes = [len(FILES[name].splitlines()) for name in FILES if name.startswith("src/house/")]
    assert figures == {
        "lines": str(sum(sizes)),
        "files": "7",
        "median file, lines": "2",
        "largest file, lines": "16 (src/house/cellar.py)",
        "longest function, lines": "9 (house.cellar.Cellar.fill)",
        "import cycles": "1",
        "functions with 8 and more parameters": "1",
        "most parameters": "8 (house.cellar.Cellar.store)",
        "duplicated runs of 6 and more lines": "1",
        "duplicated lines": "14",
        "README, lines": "3",
        "README, words": "5",
        # house, kitchen, cook have one; cellar, Cellar, fill, store, box, lid do not. Empty files need none.
        "public names with docstrings": "33.3% of 9",
    }


def test_details_say_where(house):
    assert list(measure(house).details()) == [
        "cycle: house.attic.box -> house.attic.lid -> house.attic.box",
        "parameters: 8 (house.cellar.Cellar.store)",
        "duplicated, 7 lines: src/house/cellar.py:7, src/house/kitchen.py:5",
    ]


def test_relative_and_type_only_imports_are_found(house):
    imports = imports_among(list(find_modules(house)))
    assert imports["house.cellar"] == {"house.kitchen"}
    assert imports["house.attic.box"] == {"house.attic.lid", "house.cellar"}
    assert imports["house.attic.lid"] == {"house.attic.box"}


def test_cycles_are_groups_that_reach_each_other():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert cycles_in(graph) == [["a", "b", "c"], ["d", "e"]]
    assert cycles_in({"a": {"b"}, "b": set()}) == []


def test_duplicated_runs_are_maximal_and_short_ones_do_not_count(house):
    path = house / "src/house/kitchen.py"
    path.write_text(path.read_text().replace("    return total", "    return -total"))
    (run,) = measure(house).runs
    assert run.num_lines == 6
    path.write_text(path.read_text().replace("total = 0", "total = 1"))
    assert measure(house).runs == []


def test_two_checkouts_are_compared_in_one_table(house, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["house.py", str(house), str(CHECKOUT), "--details"])
    runpy.run_path(str(CHECKOUT / "benchmarks/house.py"), run_name="__main__")
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line[:1] == "|"]
    assert rows[0] == ["", str(house), str(CHECKOUT)] and len({len(row) for row in rows}) == 1
    assert next(row for row in rows if row[0] == "files")[1] == "7"
    assert table({"one": measure(house)}).splitlines()[0].split() == ["|", "|", "one", "|"]


def test_a_folder_without_source_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["house.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(CHECKOUT / "benchmarks/house.py"), run_name="__main__")
    assert "there are no Python files in" in capsys.readouterr().err.splitlines()[-1]
