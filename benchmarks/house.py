"""How tidy is a source tree? Figures that say how hard it is to find one's way in it.

    python benchmarks/house.py .                  # this checkout
    python benchmarks/house.py BEFORE AFTER       # two checkouts side by side
    python benchmarks/house.py . --details        # and what the figures are made of

It reads the Python files below `src` (or below the folder itself, if there is no `src`) and README.md.
Nothing is imported, so it works on any checkout, with the standard library alone.

- A *cycle* is a group of modules that import each other, directly or through others. Imports inside functions
  and for type checkers count; the implicit import of a module's package does not.
- *Parameters* are counted without `self` and `cls`.
- A *duplicated run* is six or more equal lines that occur at least twice, whatever their indentation. Blank
  lines, comments, docstrings and imports are removed first.
- *Public names* are modules, classes, functions and methods whose names have no leading underscore.
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
RUN = 6  # Minimum lines of a duplicated run.
NOT_SOURCE = {"tests", "build", "dist", "node_modules", "site-packages"}
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A Python file.

    Args:
        name: Dotted name.
        path: Path relative to the checkout.
        text: Content.
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
        """Number of lines of the file."""
        return len(self.text.splitlines())


@dataclass(frozen=True)
class Entry:
    """A file or function, and its size.

    Args:
        name: Path of the file, or name of the function.
        size: Number of lines, or of parameters.
    """

    name: str
    size: int

    def __str__(self) -> str:
        return f"{self.size} ({self.name})"


@dataclass(frozen=True)
class DuplicatedRun:
    """Lines that occur several times.

    Args:
        locations: Path and number of the first line, for each occurrence.
        num_lines: Number of equal lines of code.
    """

    locations: tuple[str, ...]
    num_lines: int


@dataclass(frozen=True)
class House:
    """Measurements of a checkout."""

    files: list[Entry]
    functions: list[Entry]
    parameters: list[Entry]
    cycles: list[list[str]]
    runs: list[DuplicatedRun]
    num_duplicated: int
    readme: str
    num_public: int
    num_documented: int

    def figures(self) -> dict[str, str]:
        """Name -> figure, as printed."""
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
        """What the figures are made of, one line each."""
        for cycle in self.cycles:
            yield f"cycle: {' -> '.join([*cycle, cycle[0]])}"
        for entry in sorted(self.parameters, key=_size, reverse=True):
            yield f"parameters: {entry}"
        for run in sorted(self.runs, key=lambda run: -run.num_lines):
            yield f"duplicated, {run.num_lines} lines: {', '.join(run.locations)}"


def _size(entry: Entry) -> int:
    return entry.size


def measure(checkout: Path) -> House:
    """Measure a checkout.

    Raises:
        FileNotFoundError: If there are no Python files.
    """
    modules = list(find_modules(checkout))
    if not modules:
        raise FileNotFoundError(f"there are no Python files in '{checkout}'.")
    functions = [
        (f"{module.name}.{name}", node) for module in modules for name, node in functions_of(module.tree)
    ]
    parameters = [Entry(name, num_parameters(node)) for name, node in functions]
    runs, num_duplicated = duplicated_runs(modules)
    public = [name for module in modules for name in public_names(module)]
    readme = checkout / "README.md"
    return House(
        files=[Entry(str(module.path), module.num_lines) for module in modules],
        functions=[Entry(name, len(_lines_of(node))) for name, node in functions],
        parameters=[entry for entry in parameters if entry.size >= MANY_PARAMETERS],
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


def functions_of(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, FunctionNode]]:
    """Functions and methods at any depth, with their names inside the module."""
    for node in ast.iter_child_nodes(tree):
        name = prefix
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{node.name}".lstrip(".")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node
        yield from functions_of(node, name)


def num_parameters(function: FunctionNode) -> int:
    """Number of parameters of a function, without `self` and `cls`."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def public_names(module: Module) -> Iterator[tuple[str, bool]]:
    """Public names in a module, its own included, and whether each has a docstring."""
    if any(part.startswith("_") and not part.startswith("__") for part in module.name.split(".")):
        return
    if module.tree.body:
        yield module.name, ast.get_docstring(module.tree) is not None
    yield from _public_names_in(module.tree, module.name)


def _public_names_in(tree: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, bool]]:
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if not node.name.startswith("_"):
            yield f"{prefix}.{node.name}", ast.get_docstring(node) is not None
            if isinstance(node, ast.ClassDef):
                yield from _public_names_in(node, f"{prefix}.{node.name}")


def imports_among(modules: Sequence[Module]) -> dict[str, set[str]]:
    """Name of a module -> names of the other given modules that it imports, anywhere in the file."""
    known = {module.name for module in modules}
    graph: dict[str, set[str]] = {}
    for module in modules:
        imported: set[str] = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = _base_of(node, module)
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    imported.add(inner if inner in known else base)
        graph[module.name] = imported & known - {module.name}
    return graph


def _base_of(node: ast.ImportFrom, module: Module) -> str:
    """The absolute name of the module that an import takes names from."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    package = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*package, *([node.module] if node.module else [])])


def cycles_in(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (strongly connected components of two and more)."""
    reach = {node: _reachable(graph, node) for node in graph}
    in_cycles = [node for node in graph if node in reach[node]]
    groups = {frozenset(other for other in reach[node] if node in reach[other]) for node in in_cycles}
    return sorted(sorted(group) for group in groups)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    stack = [start]
    while stack:
        new = graph[stack.pop()] - reached
        reached |= new
        stack += new
    return reached


def duplicated_runs(modules: Sequence[Module]) -> tuple[list[DuplicatedRun], int]:
    """Maximal runs of equal lines of code, and the number of lines that belong to any of them."""
    codes = [code_lines(module) for module in modules]
    occurrences: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for file, code in enumerate(codes):
        for start in range(len(code) - RUN + 1):
            occurrences[tuple(line for _, line in code[start : start + RUN])].append((file, start))
    windows = {tuple(locations) for locations in occurrences.values() if len(locations) > 1}
    runs = []
    for locations in sorted(windows):
        if _shift(locations, -1) in windows:
            continue  # Part of a run that starts a line earlier at all locations.
        length = RUN
        while _shift(locations, length - RUN + 1) in windows:
            length += 1
        names = tuple(f"{modules[file].path}:{codes[file][start][0]}" for file, start in locations)
        runs.append(DuplicatedRun(names, length))
    lines = {(file, start + i) for locations in windows for file, start in locations for i in range(RUN)}
    return runs, len(lines)


def _shift(locations: tuple[tuple[int, int], ...], offset: int) -> tuple[tuple[int, int], ...]:
    return tuple((file, start + offset) for file, start in locations)


def code_lines(module: Module) -> list[tuple[int, str]]:
    """Numbered lines of code, without indentation, comments, docstrings and imports."""
    excluded: set[int] = set()
    for node in ast.walk(module.tree):
        if _is_docstring(node) or isinstance(node, ast.Import | ast.ImportFrom):
            excluded |= set(_lines_of(node))
    lines = module.text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    numbered = ((number, line.strip()) for number, line in enumerate(lines, 1) if number not in excluded)
    return [(number, line) for number, line in numbered if line]


def _is_docstring(node: ast.AST) -> TypeGuard[ast.Expr]:
    """Whether a node is a string that stands alone."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _lines_of(node: ast.stmt) -> range:
    """Line numbers of a statement."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def table(houses: dict[str, House]) -> str:
    """The figures of some checkouts as a Markdown table."""
    columns = {name: house.figures() for name, house in houses.items()}
    names = list(next(iter(columns.values())))
    rows = [["", *columns], *([name, *(column[name] for column in columns.values())] for name in names)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def main() -> None:
    """Print the figures of one checkout, or of two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkouts", nargs="+", type=Path, help="folders of checkouts")
    parser.add_argument("--details", action="store_true", help="print what those of the last are made of")
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
