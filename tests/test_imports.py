"""Imports point one way, heavy packages stay out of the way, and each has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "logix_like": ROOT / "logix_like",
    "logix_like.integrations": ROOT / "integrations",
    "logix_like.configs": ROOT / "configs",
    "logix_like.examples": ROOT / "examples",
}

LAYERS = (
    # From the bottom to the top: a module imports from its own layer and those before it. The longest
    # name that fits a module decides; "logix_like" itself is only the package's face.
    ("logix_like.errors", "logix_like.configs"),
    (
        "logix_like.damping",
        "logix_like.layout",
        "logix_like.ids",
        "logix_like.ranks",
        "logix_like.steps",
        "logix_like.timing",
        "logix_like.wrapping",
        "logix_like.weights",
        "logix_like.objective",
        "logix_like.path",
        "logix_like.updates",
    ),
    ("logix_like.config", "logix_like.config_source", "logix_like.config_errors"),
    ("logix_like.linalg",),
    ("logix_like.capture.batch",),
    ("logix_like.projection",),
    ("logix_like.statistics",),
    ("logix_like.capture",),
    ("logix_like.store.places",),
    ("logix_like.store.encoding",),
    ("logix_like.store.format",),
    ("logix_like.store.writing",),
    ("logix_like.store.reading",),
    ("logix_like.store.upkeep",),
    ("logix_like.store",),
    ("logix_like.inverses",),
    ("logix_like.preconditioner",),
    ("logix_like.curvature",),
    ("logix_like.query",),
    ("logix_like.report",),
    ("logix_like.subsets", "logix_like.retraining"),
    ("logix_like.estimators",),
    ("logix_like.sensitivity",),
    ("logix_like.evaluation",),
    (
        "logix_like.run.block",
        "logix_like.run.curvatures",
        "logix_like.run.delivery",
        "logix_like.run.extraction",
        "logix_like.run.logtypes",
        "logix_like.run.overflow",
        "logix_like.run.session",
        "logix_like.run.tracking",
    ),
    ("logix_like.workflows",),
    ("logix_like.run.logbook", "logix_like.run.recording", "logix_like.run.resuming"),
    ("logix_like.run.asking", "logix_like.run.live"),
    ("logix_like.run.questions",),
    ("logix_like.run",),
    ("logix_like.planning", "logix_like.scalars", "logix_like.run.starting"),
    ("logix_like", "logix_like.explorer"),
    ("logix_like.cli", "logix_like.__main__", "logix_like.examples", "logix_like.integrations"),
)

ALLOWED_UPWARDS = {("logix_like.query.result", "logix_like.report")}
"""Pairs of which the first may import from the second, but only inside a function."""

ONLY_IN = {
    "zarr": ("logix_like.store",),
    "numcodecs": ("logix_like.store",),
    "faiss": ("logix_like.query.index",),
    "dask": ("logix_like.query.distributed", "logix_like.retraining"),
    "distributed": ("logix_like.query.distributed", "logix_like.retraining"),
    "transformers": ("logix_like.integrations", "logix_like.examples"),
    "lightning": ("logix_like.integrations", "logix_like.examples"),
    "starlette": ("logix_like.explorer",),
    "uvicorn": ("logix_like.explorer",),
}

NOT_AT_START = "starlette uvicorn transformers lightning faiss dask pandas matplotlib sklearn jinja2"


@dataclass(frozen=True)
class Import:
    """One imported module."""

    target: str
    line: int
    lazy: bool
    """Whether it stands inside a function."""


def _modules() -> dict[str, Path]:
    """Every module of the package by its installed name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = _modules()


def _imports(module: str) -> Iterator[Import]:
    tree = ast.parse(MODULES[module].read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    lazy = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, id(node) in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(module, node)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(full if full in MODULES else base, node.lineno, id(node) in lazy)


def _base(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of the module that ``from ... import`` names."""
    if node.level == 0:
        return node.module or ""
    package = module.split(".")
    if MODULES[module].name != "__init__.py":
        package = package[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, node.module] if node.module else package)


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _layer(module: str) -> int:
    fitting = [
        (len(name), number)
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or (name != "logix_like" and _within(module, name))
    ]
    assert fitting, f"{module} stands in no layer; give it a place in LAYERS"
    return max(fitting)[1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_to_lower_layers(module: str) -> None:
    for found in _imports(module):
        if not _within(found.target, "logix_like") or _layer(found.target) <= _layer(module):
            continue
        allowed = any(module == a and _within(found.target, b) for a, b in ALLOWED_UPWARDS)
        assert allowed and found.lazy, f"{module}, line {found.line}: imports {found.target} from a layer above"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_packages_have_one_door(module: str) -> None:
    for found in _imports(module):
        doors = ONLY_IN.get(found.target.partition(".")[0])
        assert doors is None or any(_within(module, door) for door in doors), (
            f"{module}, line {found.line}: {found.target} may only be imported in {', '.join(doors)}"
        )


@pytest.mark.parametrize("module", [m for m in sorted(MODULES) if _within(m, "logix_like.integrations")])
def test_integrations_name_their_siblings_relatively(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert not _within(node.module or "", "logix_like.integrations")


def test_the_import_loads_no_heavy_package() -> None:
    code = f"import sys, logix_like; print(*sorted(set('{NOT_AT_START}'.split()) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
