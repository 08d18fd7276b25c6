"""Fixtures: the wheel, installed outside the repository, and a folder with modules that have its packages' names."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from sightline.imports import PACKAGES

REPOSITORY = Path(__file__).parents[2]
SOURCES = [*sorted(PACKAGES), "sightline", "pyproject.toml", "README.md", "LICENSE"]


@dataclass(frozen=True)
class Wheel:
    """The wheel's file, and the folder with the commands of the virtual environment that it is installed in."""

    file: Path
    commands: Path


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """Build the wheel from a copy of the sources, and install it into a new virtual environment.

    The environment finds the dependencies in this test's own site-packages, through a .pth file. Python reads no .pth
    file of a folder that is added in this way, so the editable installation of Sightline there has no effect.
    """
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, copy = REPOSITORY / name, folder / "source" / name
        copy.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run([*pip, *build], check=True)
    (file,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    site_packages = next((folder / "venv/lib").glob("python*/site-packages"))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "venv/bin/python")
    install = ["--python", python, "install", "--no-deps", "--no-index", "--ignore-installed", str(file)]
    subprocess.run([*pip, *install], check=True)
    return Wheel(file, folder / "venv/bin")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with modules and packages that have the names of Sightline's, and raise when they are imported."""
    folder = tmp_path / "hostile"
    for name in PACKAGES:
        file = folder / f"{name}.py" if name in ("siglip", "storage", "curation") else folder / name / "__init__.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"raise RuntimeError({name!r})")
    return folder
