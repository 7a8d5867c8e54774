"""How is the house kept? Figures of a source tree that say how hard it is to find one's way in it.

    python benchmarks/house.py .                  # this checkout
    python benchmarks/house.py BEFORE AFTER       # two checkouts side by side
    python benchmarks/house.py . --details        # and where they come from

Read are the Python files below `src` (below the folder itself, where there is none) and README.md. Nothing is
imported, so any checkout will do, and the standard library is enough.

- A *cycle* is a group of modules that import each other, directly or by way of others. Imports inside
  functions and for type checkers count; that importing a module imports its package does not.
- *Parameters* are counted without `self` and `cls`.
- A *duplicated run* is the same six or more lines in two places or more, whatever their indentation. Blank
  lines, comments, docstrings and imports are left out before runs are sought.
- *Public names* are modules, and in them classes, functions and methods, without an underscore in front.
"""

import argparse
import ast
import io
import statistics
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

MANY_PARAMETERS = 8
RUN = 6  # Lines that are equal, from which on they count as duplicated.
NOT_SOURCE = {"tests", "build", "dist", "node_modules", "site-packages"}
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file.

    Args:
        name: Dotted.
        path: Relative to the checkout.
        text: What it says.
        is_package: Whether it is the `__init__` of a package.
    """

    name: str
    path: Path
    text: str
    is_package: bool
    tree: ast.Module = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", ast.parse(self.text))

    @property
    def num_lines(self) -> int:
        """Lines of the file."""
        return len(self.text.splitlines())


@dataclass(frozen=True)
class Place:
    """A part of a file that is worth naming.

    Args:
        name: What is there.
        size: Its lines, or parameters.
    """

    name: str
    size: int

    def __str__(self) -> str:
        return f"{self.size} ({self.name})"


@dataclass(frozen=True)
class DuplicatedRun:
    """The same lines in several places.

    Args:
        places: Path and number of the first line of each.
        num_lines: Lines of code that are equal.
    """

    places: tuple[str, ...]
    num_lines: int


@dataclass(frozen=True)
class House:
    """What is measured of a checkout."""

    files: list[Place]
    functions: list[Place]
    parameters: list[Place]
    cycles: list[list[str]]
    runs: list[DuplicatedRun]
    num_duplicated: int
    readme: str
    num_public: int
    num_documented: int

    def figures(self) -> dict[str, str]:
        """Name -> figure, as they are printed."""
        sizes = [file.size for file in self.files]
        share = self.num_documented / self.num_public if self.num_public else 1.0
        return {
            "lines": f"{sum(sizes):,}",
            "files": f"{len(sizes):,}",
            "median file, lines": f"{statistics.median(sizes):g}" if sizes else "0",
            "largest file, lines": str(max(self.files, key=_size)) if sizes else "none",
            "longest function, lines": str(max(self.functions, key=_size)) if self.functions else "none",
            "import cycles": str(len(self.cycles)),
            f"functions with {MANY_PARAMETERS} and more parameters": str(len(self.parameters)),
            "most parameters": str(max(self.parameters, key=_size)) if self.parameters else "fewer",
            f"duplicated runs of {RUN} and more lines": str(len(self.runs)),
            "duplicated lines": f"{self.num_duplicated:,}",
            "README, lines": str(len(self.readme.splitlines())),
            "README, words": f"{len(self.readme.split()):,}",
            "public names with docstrings": f"{share:.1%} of {self.num_public:,}",
        }

    def details(self) -> Iterator[str]:
        """Where the figures come from, a line each."""
        for cycle in self.cycles:
            yield f"cycle: {' -> '.join([*cycle, cycle[0]])}"
        for place in sorted(self.parameters, key=_size, reverse=True):
            yield f"parameters: {place}"
        for run in sorted(self.runs, key=lambda run: -run.num_lines):
            yield f"duplicated, {run.num_lines} lines: {', '.join(run.places)}"


def _size(place: Place) -> int:
    return place.size


def measure(checkout: Path) -> House:
    """Measure a checkout.

    Raises:
        FileNotFoundError: If there are no Python files.
    """
    modules = list(find_modules(checkout))
    if not modules:
        raise FileNotFoundError(f"there are no Python files in '{checkout}'.")
    functions = [(f"{one.name}.{name}", node) for one in modules for name, node in functions_of(one.tree)]
    parameters = [Place(name, num_parameters(node)) for name, node in functions]
    runs, num_duplicated = duplicated_runs(modules)
    public = [name for module in modules for name in public_names(module)]
    readme = checkout / "README.md"
    return House(
        files=[Place(str(module.path), module.num_lines) for module in modules],
        functions=[Place(name, len(_lines_of(node))) for name, node in functions],
        parameters=[place for place in parameters if place.size >= MANY_PARAMETERS],
        cycles=cycles_in(imports_among(modules)),
        runs=runs,
        num_duplicated=num_duplicated,
        readme=readme.read_text(encoding="utf-8") if readme.is_file() else "",
        num_public=len(public),
        num_documented=sum(is_documented for _, is_documented in public),
    )


def find_modules(checkout: Path) -> Iterator[Module]:
    """The Python files of a checkout's source."""
    root = checkout / "src" if (checkout / "src").is_dir() else checkout
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in NOT_SOURCE or part.startswith(".") or part.endswith(".egg-info") for part in parts):
            continue
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        yield Module(name, path.relative_to(checkout), path.read_text(encoding="utf-8"), is_package)


def functions_of(tree: ast.AST, before: str = "") -> Iterator[tuple[str, FunctionNode]]:
    """Functions and methods at any depth, with their names inside the module."""
    for node in ast.iter_child_nodes(tree):
        name = before
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{before}.{node.name}".lstrip(".")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node
        yield from functions_of(node, name)


def num_parameters(function: FunctionNode) -> int:
    """Parameters of a function, but for `self` and `cls`."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def public_names(module: Module) -> Iterator[tuple[str, bool]]:
    """Public names of a module, and whether each has a docstring; the module itself is one."""
    if any(part.startswith("_") and not part.startswith("__") for part in module.name.split(".")):
        return
    if module.tree.body:
        yield module.name, ast.get_docstring(module.tree) is not None
    yield from _public_names_in(module.tree, module.name)


def _public_names_in(tree: ast.Module | ast.ClassDef, before: str) -> Iterator[tuple[str, bool]]:
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if not node.name.startswith("_"):
            yield f"{before}.{node.name}", ast.get_docstring(node) is not None
            if isinstance(node, ast.ClassDef):
                yield from _public_names_in(node, f"{before}.{node.name}")


def imports_among(modules: Sequence[Module]) -> dict[str, set[str]]:
    """Name of a module -> names of those of the same source that it imports, wherever in it."""
    known = {module.name for module in modules}
    found: dict[str, set[str]] = {}
    for module in modules:
        wanted: set[str] = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = _base_of(node, module)
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    wanted.add(inner if inner in known else base)
        found[module.name] = wanted & known - {module.name}
    return found


def _base_of(node: ast.ImportFrom, module: Module) -> str:
    """The module that an import takes names from, the leading dots resolved."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    package = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*package, *([node.module] if node.module else [])])


def cycles_in(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (strongly connected components of two and more)."""
    reach = {node: _reachable(graph, node) for node in graph}
    in_cycles = [node for node in graph if node in reach[node]]
    groups = {frozenset(one for one in reach[node] if node in reach[one]) for node in in_cycles}
    return sorted(sorted(group) for group in groups)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def duplicated_runs(modules: Sequence[Module]) -> tuple[list[DuplicatedRun], int]:
    """Runs of equal lines of code, each as long as can be, and how many lines are in any of them."""
    codes = [code_lines(module) for module in modules]
    places_of: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for file, code in enumerate(codes):
        for start in range(len(code) - RUN + 1):
            places_of[tuple(line for _, line in code[start : start + RUN])].append((file, start))
    windows = {tuple(places) for places in places_of.values() if len(places) > 1}
    runs = []
    for places in sorted(windows):
        if _moved(places, -1) in windows:
            continue  # It goes on from the line before, in all its places.
        length = RUN
        while _moved(places, length - RUN + 1) in windows:
            length += 1
        names = tuple(f"{modules[file].path}:{codes[file][start][0]}" for file, start in places)
        runs.append(DuplicatedRun(names, length))
    lines = {(file, start + i) for places in windows for file, start in places for i in range(RUN)}
    return runs, len(lines)


def _moved(places: tuple[tuple[int, int], ...], by: int) -> tuple[tuple[int, int], ...]:
    return tuple((file, start + by) for file, start in places)


def code_lines(module: Module) -> list[tuple[int, str]]:
    """Numbered lines of code without indentation, comments, docstrings and imports."""
    left_out: set[int] = set()
    for node in ast.walk(module.tree):
        if _is_docstring(node) or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(_lines_of(node))
    lines = module.text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    numbered = ((number, line.strip()) for number, line in enumerate(lines, 1) if number not in left_out)
    return [(number, line) for number, line in numbered if line]


def _is_docstring(node: ast.AST) -> TypeGuard[ast.Expr]:
    """Whether a node is a text that stands alone."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _lines_of(node: ast.stmt) -> range:
    """Numbers of the lines of a statement."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def table(houses: dict[str, House]) -> str:
    """The figures of some checkouts as a Markdown table."""
    columns = {name: house.figures() for name, house in houses.items()}
    names = list(next(iter(columns.values())))
    rows = [["", *columns], *([name, *(column[name] for column in columns.values())] for name in names)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def main() -> None:
    """Print the figures of one checkout, or of two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkouts", nargs="+", type=Path, help="folders of checkouts")
    parser.add_argument("--details", action="store_true", help="print where those of the last come from")
    arguments = parser.parse_args()
    try:
        houses = {str(checkout): measure(checkout) for checkout in arguments.checkouts}
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        parser.error(str(error))
    print(table(houses))
    if arguments.details:
        print("", *list(houses.values())[-1].details(), sep="\n")


if __name__ == "__main__":
    main()
