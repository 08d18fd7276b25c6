"""The structure of the packages: small modules, small packages, and imports that point one way.

The imports are read from the source files with `ast`: also those inside functions and under `TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MAX_LINES = 350
MAX_FILES = 12

MAY_IMPORT = {
    "storage": (),
    "siglip": ("storage",),
    "pipelines": ("storage", "siglip"),
    "serve": ("storage", "siglip"),
    "curation": ("storage", "siglip", "pipelines.output"),
    "sightline": ("storage", "siglip", "pipelines", "serve", "curation"),
}
"""For each package the other packages and modules that it may import."""

EXCEPTIONS = {
    "curation.retag": (
        "pipelines.cluster",
        "pipelines.config",
        "pipelines.planning",
        "pipelines.progress",
        "pipelines.tables",
    ),  # a job on Ray
    "curation.tagged_output": ("pipelines.config",),
    "curation.export.images": ("pipelines.inputs",),  # what an archive is
    # The reader of outputs, and their search. It has no Ray in it, and is imported only if a search is configured.
    "serve.search.output": ("curation",),
    "curation.review.originals": ("pipelines.config", "pipelines.inputs"),  # it reads originals with the job's readers
}
"""For a module what it may import in addition."""


@cache
def find_modules() -> dict[str, Path]:
    """The product's modules by their dotted names. A package has the name of its folder."""
    modules = {}
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def read_imports(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """The product's modules that a module imports, each with its line.

    `from a import b` imports `a.b` if that is a module, else `a`.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: a relative import; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in MAY_IMPORT:
                yield (name if name in find_modules() else name.rpartition(".")[0] or name), node.lineno


@cache
def import_graph() -> dict[str, dict[str, int]]:
    """For each module the modules that it imports, with the line of the first import."""
    graph: dict[str, dict[str, int]] = {}
    for module, path in find_modules().items():
        found = graph.setdefault(module, {})
        for imported, line in read_imports(module, path):
            if imported != module:
                found.setdefault(imported, line)
    return graph


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_every_package_is_found() -> None:
    assert {module.split(".")[0] for module in find_modules()} == set(MAY_IMPORT)
    assert len(find_modules()) > 100
    imports = import_graph()["sightline.__main__"]
    assert imports, "imports are found"


def test_no_module_is_too_long() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in find_modules().items()}
    assert {module: lines for module, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_package_has_too_many_files() -> None:
    """The files of any kind directly in a folder; `__init__.py` and a README are not counted."""
    folders = {path.parent for path in find_modules().values()}
    counts = {
        folder.relative_to(ROOT).as_posix(): sum(
            path.is_file() and path.name not in ("__init__.py", "README.md") for path in folder.iterdir()
        )
        for folder in folders
    }
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    wrong = [
        f"{module}:{line} imports {imported}"
        for module, imports in import_graph().items()
        if is_in(module, package)
        for imported, line in imports.items()
        if not any(is_in(imported, one) for one in (package, *MAY_IMPORT[package], *EXCEPTIONS.get(module, ())))
    ]
    assert wrong == []


def test_every_exception_is_needed() -> None:
    for module, exceptions in EXCEPTIONS.items():
        for one in exceptions:
            assert any(is_in(imported, one) for imported in import_graph()[module]), (module, one)


def test_no_import_cycle() -> None:
    """Remove the modules that import no remaining module, again and again: what then remains is in or above a cycle."""
    graph = {module: set(imports) for module, imports in import_graph().items()}
    while leaves := [module for module, imports in graph.items() if not imports & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert {module: sorted(imports & graph.keys()) for module, imports in graph.items()} == {}


def test_no_module_is_called_utils() -> None:
    names = {"utils", "util", "helpers", "misc", "common"}
    assert [module for module in find_modules() if module.rpartition(".")[2] in names] == []
