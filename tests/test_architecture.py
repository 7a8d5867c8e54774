"""The house rules: imports run one way, files are short, the command line is light."""

import ast
import importlib
import itertools
import re
from pathlib import Path

import pytest

import calm
from calm.renamed import MOVED

SOURCE = Path(__file__).parents[1] / "src" / "calm"
FILES = sorted(SOURCE.rglob("*.py"))

# A room may import from rooms of a lower level only; `errors` is open to all but `core`.
LEVELS = {
    "errors": 0,
    "extras": 0,
    "core": 0,
    "text": 0,
    "hub": 0,
    "ranges": 0,
    "renamed": 0,
    "mistakes": 0,
    "storage": 0,
    "models": 1,
    "data": 1,
    "terminal": 1,
    "progress": 0,
    "quantities": 0,
    "hardware": 2,
    "compiling": 2,
    "flops": 2,
    "generation": 3,
    "texts": 2,
    "doctor": 3,
    "chat": 3,
    "evaluation": 3,
    "training": 4,
    "report": 4,
    "harness": 4,
    "serving": 4,
    "comparison": 5,
    "facts": 5,
    "planning": 5,
    "results": 6,
    "demo": 7,
    "sharing": 7,
    "commands": 8,
    "command_help": 8,
    "cli": 9,
    "__main__": 10,
}
MOST_LINES = 400
# torch and what it needs itself, the standard library, and core.
ALLOWED_IN_CORE = {
    "functools",
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


ARCHITECTURE = (SOURCE.parents[1] / "docs/architecture.md").read_text(encoding="utf-8")
WALKS = re.findall(r"^    (\S+(?: → \S+)+)$", ARCHITECTURE, re.MULTILINE)


@pytest.mark.parametrize("walk", WALKS)
def test_the_walks_are_imports_that_go_down(walk):
    steps = walk.split(" → ")
    for above, below in itertools.pairwise(steps):
        [path] = [path for path in FILES if module_of(path) == f"calm.{above}"]
        assert f"calm.{below}" in imports_of(path), f"{above} does not import {below}"
        rooms = [step.split(".")[0] for step in (above, below)]
        assert rooms[0] == rooms[1] or LEVELS[rooms[0]] > LEVELS[rooms[1]]


def test_there_are_three_walks():
    assert len(WALKS) >= 10 and all(
        f"**{start}" in ARCHITECTURE for start in ("One batch", "One prompt", "One draw")
    )


def test_the_tree_names_every_file():
    tree = ARCHITECTURE.split("## What is where")[1].split("```")[1]
    words = set(re.findall(r"[a-z_]+", tree))
    mapped = SOURCE / "training"  # Its own map is tested in tests/training/test_map.py.
    names = {path.stem for path in FILES if mapped not in path.parents} - {
        "__init__",
        "__main__",
        "generation",
        "renamed",
    }
    assert names - words == set()


def test_the_table_of_rooms_is_the_table_of_levels():
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", ARCHITECTURE, re.MULTILINE)
    told = {room: int(level) for level, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}
    assert told == {
        room: level for room, level in LEVELS.items() if room not in ("__main__", "generation", "renamed")
    }


def test_what_was_renamed_has_its_old_name_for_one_version():
    with pytest.warns(DeprecationWarning, match="calm.generation is now calm.texts"):
        importlib.reload(importlib.import_module("calm.generation"))
    with pytest.warns(DeprecationWarning, match="calm.TemperatureSettings is now calm.sampler_from"):
        sampler = calm.TemperatureSettings(temperature=0.5, sampler="pool", num_draws=9)
    assert sampler == calm.PoolSampler(temperature=0.5, num_draws=9)
    with pytest.raises(ImportError, match=r"HeadWork is now HeadFlops"):
        from calm.models.heads import HeadWork  # noqa: F401


@pytest.mark.parametrize("old", MOVED)
def test_a_module_that_has_moved_says_where_it_is(old):
    with pytest.raises(ModuleNotFoundError, match=rf"{re.escape(old)} is now "):
        importlib.import_module(old)
    for new in re.findall(r"calm[\w.]+", MOVED[old].rstrip(".")):
        importlib.import_module(new)


def test_whether_a_network_is_a_calm_is_asked_in_one_place():
    """Others ask `calm.models.language_model`; two take a CALM and nothing else."""
    asked = re.compile(r"isinstance\([^)]*CalmForCausalLM")
    files = [str(path.relative_to(SOURCE)) for path in FILES if asked.search(path.read_text("utf-8"))]
    outside = {name for name in files if not name.startswith("models/")}
    assert outside == {"harness.py", "serving/run.py"}
