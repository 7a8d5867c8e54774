"""Rules for the source: imports go one way, files are short, and docs/architecture.md is up to date."""

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

# A component, a package or module directly in calm, imports only from lower levels; all but `core` may
# import `errors`.
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
MAX_LINES = 400
# torch, parts of the standard library, and core itself.
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


def component_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports_of(path: Path) -> list[str]:
    """Names of all modules that a file imports, also inside functions and for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.append(node.module)
            # A name imported from a package may be one of its modules.
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def module_of(path: Path) -> str:
    name = ".".join(("calm", *path.relative_to(SOURCE).with_suffix("").parts))
    return name.removesuffix(".__init__")


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of the first import cycle, in order; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, importers: list[str]) -> list[str]:
        if module in importers:
            return importers[importers.index(module) :]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if cycle := visit(other, [*importers, module]):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_to_lower_levels(path):
    component = component_of(path)
    if component == "__init__":
        return  # The package's public names.
    for module in imports_of(path):
        if module == "calm" or not module.startswith("calm."):
            continue
        other = module.split(".")[1]
        allowed = other == component or LEVELS[other] < LEVELS[component] or other == "errors"
        assert allowed and (component, other) != ("core", "errors"), f"{component} must not import {module}"


def test_there_are_no_import_cycles():
    """Not inside a component either, nor by imports of types."""
    modules = {module_of(path): path for path in FILES}
    modules.pop("calm")  # The public names, which are imported lazily.
    graph = {
        module: {other for other in imports_of(path) if other in modules and other != module}
        for module, path in modules.items()
    }
    assert cycle_in(graph) == []


def test_cycle_in_finds_cycles():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_core_imports_only_torch_and_the_standard_library():
    for path in (SOURCE / "core").glob("*.py"):
        assert {module.split(".")[0] for module in imports_of(path)} <= ALLOWED_IN_CORE, path
        assert "nn.Module" not in path.read_text(encoding="utf-8")


def test_every_component_has_a_level():
    assert {component_of(path) for path in FILES} - {"__init__"} == set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_no_file_is_called_utils_or_the_like():
    assert not [path for path in FILES if re.search(r"(utils?|common|misc|helpers?|_v\d)\.py$", path.name)]


ARCHITECTURE = (SOURCE.parents[1] / "docs/architecture.md").read_text(encoding="utf-8")
CODE_PATHS = re.findall(r"^    (\S+(?: → \S+)+)$", ARCHITECTURE, re.MULTILINE)


@pytest.mark.parametrize("code_path", CODE_PATHS)
def test_documented_code_paths_are_imports_that_go_down(code_path):
    steps = code_path.split(" → ")
    for above, below in itertools.pairwise(steps):
        [path] = [path for path in FILES if module_of(path) == f"calm.{above}"]
        assert f"calm.{below}" in imports_of(path), f"{above} does not import {below}"
        components = [step.split(".")[0] for step in (above, below)]
        assert components[0] == components[1] or LEVELS[components[0]] > LEVELS[components[1]]


def test_three_code_paths_are_documented():
    assert len(CODE_PATHS) >= 10 and all(
        f"**{start}" in ARCHITECTURE for start in ("One batch", "One prompt", "One draw")
    )


def test_documented_tree_names_every_file():
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


def test_documented_levels_are_those_checked_here():
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", ARCHITECTURE, re.MULTILINE)
    documented = {name: int(level) for level, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert documented == {
        name: level for name, level in LEVELS.items() if name not in ("__main__", "generation", "renamed")
    }


def test_old_names_work_with_a_warning_or_say_the_new_name():
    with pytest.warns(DeprecationWarning, match="calm.generation is now calm.texts"):
        importlib.reload(importlib.import_module("calm.generation"))
    with pytest.warns(DeprecationWarning, match="calm.TemperatureSettings is now calm.sampler_from"):
        sampler = calm.TemperatureSettings(temperature=0.5, sampler="pool", num_draws=9)
    assert sampler == calm.PoolSampler(temperature=0.5, num_draws=9)
    with pytest.raises(ImportError, match=r"HeadWork is now HeadFlops"):
        from calm.models.heads import HeadWork  # noqa: F401


@pytest.mark.parametrize("old", MOVED)
def test_importing_a_moved_module_names_the_new_one(old):
    with pytest.raises(ModuleNotFoundError, match=rf"{re.escape(old)} is now "):
        importlib.import_module(old)
    for new in re.findall(r"calm[\w.]+", MOVED[old].rstrip(".")):
        importlib.import_module(new)


def test_only_models_checks_whether_a_network_is_a_calm():
    """Others use `calm.models.language_model`; the two exceptions accept nothing but a CALM."""
    check = re.compile(r"isinstance\([^)]*CalmForCausalLM")
    files = [str(path.relative_to(SOURCE)) for path in FILES if check.search(path.read_text("utf-8"))]
    outside = {name for name in files if not name.startswith("models/")}
    assert outside == {"harness.py", "serving/run.py"}
