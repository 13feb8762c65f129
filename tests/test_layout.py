"""The layout is a promise: who may import whom, how long things may get, where code may lie."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HARNESS = sorted((ROOT / "harness").glob("*.py"))
METHODS = sorted(p for p in (ROOT / "algorithms").glob("*.py") if p.name != "__init__.py")

# A module imports only those above it.
ORDER = """
    refusal durable lock summary parquet compaction repair record
    cards published trees latest losses mixes layers zoo nets protocol averages descent peers
    registry settings sections hypers schedule cohorts config overrides
    space plan searches axes
    formats text sources data deals partitions batches fit precision together evaluate
    work host inline books checkpoint scoring server actors calls pool archive trial
    tryout lanes stacks room cluster
    desk population ledger portrait projection tracking scribe referee errands sweep costs outlook
    places inference metrics cells caveats statistics verdicts tables sheets typeset plots diagrams board
    series arrangement views scores gallery page live
    terminal printout progress catalogue watch rig probes check show preview claims audit repeat verify
    floor stand timings bench cli
""".split()  # noqa: SIM905
ONLY_IN = {
    "ray": {
        "actors",
        "pool",
        "archive",
        "trial",
        "cluster",
        "scribe",
        "referee",
        "errands",
        "sweep",
        "stand",
        "timings",
    },
    "pyarrow": {"parquet", "compaction", "repair"},
    "mlflow": {"projection"},
}
LAZY = {"sklearn", "torchvision", "matplotlib", "mlflow", "optuna", "PIL"}  # slow: imported inside functions
TORCH_FREE = (
    *("refusal", "durable", "lock", "parquet", "compaction", "repair", "record", "summary", "cards", "tracking"),
    *("board", "page", "live", "terminal"),
)
FOR_METHODS = {
    *("__future__", "abc", "collections", "dataclasses", "functools", "itertools", "math", "operator", "typing"),
    *("annotated_types", "torch"),
    *("harness.protocol", "harness.trees", "harness.losses", "harness.nets", "algorithms.fedavg"),
    # Pure functions that several methods share.
    *("harness.averages", "harness.descent", "harness.latest", "harness.mixes", "harness.peers", "harness.refusal"),
}
SECTIONS = ("Paper:", "Travels down:", "Travels up:", "Remembered by the client:", "Differences from ")
MOST_LINES = {"harness": 300, "algorithms": 150}
MOST_LINES_OF_A_FUNCTION = 40


def name_of(path: Path) -> str:
    return path.stem


@lru_cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node: ast.AST) -> Iterator[str]:
    """Full names of the modules imported anywhere below a node; `from harness import data` is harness.data."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from (alias.name for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            assert found.level == 0, "relative import"
            whole = [f"{found.module}.{alias.name}" for alias in found.names]
            yield from whole if found.module == "harness" else [str(found.module)]


def at_import(path: Path) -> Iterator[str]:
    """The modules imported when this one is: not those inside functions, not those for type checkers only."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            lazy = isinstance(child, ast.FunctionDef) or (
                isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            )
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield from imports(child)
            elif not lazy:
                yield from visit(child)

    return visit(tree(path))


def within(name: str, allowed: set[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def test_the_modules_are_those_of_the_order() -> None:
    assert {p.stem for p in HARNESS} - {"__init__"} <= set(ORDER), "put the new module into ORDER"
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("path", HARNESS, ids=name_of)
def test_a_module_imports_only_those_above_it(path: Path) -> None:
    above = set(ORDER[: ORDER.index(path.stem)]) if path.stem in ORDER else set()
    ours = {name.split(".")[1] for name in imports(tree(path)) if name.startswith("harness.")}
    assert ours & set(ORDER) <= above
    assert "algorithms" not in {name.split(".")[0] for name in imports(tree(path))}, "methods are loaded by registry"


@pytest.mark.parametrize("path", HARNESS, ids=name_of)
def test_libraries_stay_where_they_belong(path: Path) -> None:
    used = {name.split(".")[0] for name in imports(tree(path))}
    for library, places in ONLY_IN.items():
        assert library not in used or path.stem in places, f"{library} is used in {places} only"
    assert not {name.split(".")[0] for name in at_import(path)} & LAZY


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_a_method_imports_little(path: Path) -> None:
    assert [name for name in imports(tree(path)) if not within(name, FOR_METHODS)] == []


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_a_method_says_what_it_is_and_what_travels(path: Path) -> None:
    said = ast.get_docstring(tree(path)) or ""
    assert re.fullmatch(r"[A-Z].+[^.]\.", said.split("\n", 1)[0]), "one sentence first"
    places = [said.find(section) for section in SECTIONS]
    assert -1 not in places, f"missing: {SECTIONS[places.index(-1)]}"
    assert places == sorted(places)


@pytest.mark.parametrize("path", [*HARNESS, *METHODS], ids=name_of)
def test_budgets(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES[path.parent.name]
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}
    assert {name: lines for name, lines in sizes.items() if lines > MOST_LINES_OF_A_FUNCTION} == {}


def test_inheritance_is_at_most_one_level_deep() -> None:
    """Counted among our own classes; `Algorithm`, which only declares, is no level."""
    classes = [n for path in (*HARNESS, *METHODS) for n in ast.walk(tree(path)) if isinstance(n, ast.ClassDef)]
    bases = {c.name: [ast.unparse(base).rpartition(".")[2] for base in c.bases] for c in classes}

    def depth(name: str) -> int:
        ours = [base for base in bases.get(name, []) if base in bases and base != "Algorithm"]
        return 1 + max(map(depth, ours)) if ours else 0

    assert len(bases) > 50, "classes were found"
    assert [name for name in bases if depth(name) > 1] == []


@pytest.mark.parametrize("folder", ["datasets", "sweeps"])
def test_cards_are_data(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert files
    assert [path.name for path in files if path.suffix not in (".toml", ".md")] == []


def loaded_by(modules: str) -> set[str]:
    """What a fresh Python has loaded after it imported these modules."""
    code = f"import sys, {modules}; print(*(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_the_board_needs_no_torch() -> None:
    assert not loaded_by(", ".join(f"harness.{name}" for name in TORCH_FREE)) & {"torch", "ray", *LAZY}


def test_the_command_answers_without_heavy_imports() -> None:
    assert not loaded_by("harness.cli") & {"torch", "ray", "numpy", "pyarrow", "rich", *LAZY}
