"""The plan of the house, read from its imports: down only, no private rooms of others, nothing but jax and optax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "optclip"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = [  # each may import from the floors before it, and from its own; methods not from each other
    {
        "_at_once",
        "_checks",
        "_finite",
        "_largest",
        "_loop",
        "_mesh",
        "_numerics",
        "_slots",
        "_squares",
        "_transformation",
        "_vectors",
    },
    {"measures", "responses", "sketch"},
    {"_rules", "_history", "_memories", "_course", "_elementwise", "_recorded", "selection"},
    {"_clip"},
    {"_methods"},
    {"_wrappers", "functional", "stats", "thresholds", "wrappers"},
    {"_observe", "_advise", "_plot", "per_example", "flax"},
    {"__init__"},
]
LONGEST = 290
ALLOWED = {"jax", "optax", "numpy", "optclip", *sys.stdlib_module_names}
OPTIONAL = {"_plot.py": {"matplotlib"}, "flax.py": {"flax"}}  # inside functions, or in a room one enters by name


def room(path: Path) -> str:
    """The first name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, top: bool = False) -> list[str]:
    """The dotted names that a file imports; those at the top level alone if ``top``."""
    tree = ast.parse(path.read_text())
    found = []
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def own(path: Path) -> set[str]:
    """The modules of this package that a file imports, dotted below it."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "optclip":
            keep = [p for i, p in enumerate(parts[1:], 1) if _is_module(parts[1 : i + 1])]
            found.add(".".join(keep) or "__init__")
    return found


def _is_module(parts: list[str]) -> bool:
    place = PACKAGE.joinpath(*parts)
    return place.is_dir() or place.with_suffix(".py").exists()


def floor(name: str) -> int:
    """The floor of a room; a room that is not in the plan has none."""
    found = [i for i, rooms in enumerate(FLOORS) if name.split(".")[0] in rooms]
    assert found, f"{name} has no floor in the plan of the house"
    return found[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = floor(room(path))
    for name in own(path):
        there = floor(name)
        same_room = name.split(".")[0] == room(path)
        assert there < here or (there == here and not (room(path) == "_methods" and same_room)), f"upward: {name}"


def test_no_import_is_circular():
    graph = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): own(p) for p in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circular: {' > '.join((*trail, name))}"
        if name in done:
            return
        for below in graph.get(name, graph.get(f"{name}.__init__", set())):
            if below != name:
                visit(below, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_public_names_of_the_runtime_dependencies(path):
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] in ALLOWED | OPTIONAL.get(path.name, set()), f"{name} is no dependency"
        if parts[0] != "optclip":
            assert not any(p.startswith("_") for p in parts if p != "__future__"), f"{name} is private"
    if path.name != "flax.py":
        assert not {n.split(".")[0] for n in imports(path, top=True)} & {"flax", "matplotlib"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
            assert length <= 52, f"{node.name} has {length} lines"


def test_importing_optclip_loads_neither_flax_nor_matplotlib():
    code = "import sys, optclip; print([m for m in ('flax', 'matplotlib', 'orbax', 'chex.test') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
