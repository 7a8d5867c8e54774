"""The house rules: imports run one way, files are short, the command line is light."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "calm"
FILES = sorted(SOURCE.rglob("*.py"))

# A room may import from rooms of a lower level only; `errors` is open to all but `core`.
LEVELS = {
    "errors": 0,
    "core": 0,
    "text": 0,
    "hub": 0,
    "ranges": 0,
    "mistakes": 0,
    "storage": 0,
    "models": 1,
    "data": 1,
    "terminal": 1,
    "flops": 2,
    "generation": 3,
    "texts": 2,
    "doctor": 2,
    "evaluation": 3,
    "training": 4,
    "report": 4,
    "harness": 4,
    "serving": 4,
    "comparison": 5,
    "demo": 5,
    "sharing": 6,
    "commands": 7,
    "cli": 8,
    "__main__": 9,
}
MOST_LINES = 400
# torch and what it needs itself, the standard library, and core.
ALLOWED_IN_CORE = {
    "operator",
    "torch",
    "math",
    "itertools",
    "dataclasses",
    "collections",
    "hashlib",
    "typing",
    "calm",
}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports_of(path: Path) -> list[str]:
    """Names of all modules that a file imports, at any depth, for type checkers only included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.append(node.module)
            # What is imported from a package may be a module of it.
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def module_of(path: Path) -> str:
    name = ".".join(("calm", *path.relative_to(SOURCE).with_suffix("").parts))
    return name.removesuffix(".__init__")


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, the first found; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, above: list[str]) -> list[str]:
        if module in above:
            return above[above.index(module) :]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if ring := visit(other, [*above, module]):
                return ring
        done.add(module)
        return []

    return next((ring for module in sorted(graph) if (ring := visit(module, []))), [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    room = room_of(path)
    if room == "__init__":
        return  # The package's public names.
    for module in imports_of(path):
        if module == "calm" or not module.startswith("calm."):
            continue
        other = module.split(".")[1]
        allowed = other == room or LEVELS[other] < LEVELS[room] or other == "errors"
        assert allowed and (room, other) != ("core", "errors"), f"{room} must not import {module}"


def test_no_module_imports_itself_by_way_of_others():
    """Inside a room as well, and where only a type is imported."""
    modules = {module_of(path): path for path in FILES}
    modules.pop("calm")  # The public names, which import everything when they are asked for.
    graph = {
        module: {other for other in imports_of(path) if other in modules and other != module}
        for module, path in modules.items()
    }
    assert cycle_in(graph) == []


def test_a_cycle_would_be_found():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_core_is_torch_and_the_standard_library():
    for path in (SOURCE / "core").glob("*.py"):
        assert {module.split(".")[0] for module in imports_of(path)} <= ALLOWED_IN_CORE, path
        assert "nn.Module" not in path.read_text(encoding="utf-8")


def test_every_room_has_a_level():
    assert {room_of(path) for path in FILES} - {"__init__"} == set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_names_that_say_nothing_are_not_used():
    assert not [path for path in FILES if re.search(r"(utils?|common|misc|helpers?|_v\d)\.py$", path.name)]
