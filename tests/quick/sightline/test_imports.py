"""The import guard: Sightline's own packages are imported, whatever the working directory holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sightline.imports import PACKAGES, ROOT

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with a module of the name of each of Sightline's packages, which raises when it is imported."""
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('the user has {name}, which was imported')")
    return tmp_path


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_guard_knows_every_package_of_the_distribution() -> None:
    found = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    assert found - {"benchmarks", "scripts", "tests"} == PACKAGES | {"sightline"}
    assert ROOT == REPOSITORY


def test_a_script_beside_modules_of_the_same_names_imports_sightlines(hostile: Path) -> None:
    (hostile / "job.py").write_text(
        "import sightline, storage, serve, pipelines, siglip.images, curation, configs\n"
        "print(*(m.__path__[0] for m in (storage, serve, pipelines, siglip, curation, configs)), sep='\\n')"
    )
    for arguments in (["job.py"], ["-m", "job"], ["-c", "import sightline; import job"]):
        result = run(hostile, *arguments, PYTHONPATH=".")
        assert result.returncode == 0, result.stderr
        assert {Path(line).parent for line in result.stdout.splitlines()} == {REPOSITORY}


@pytest.mark.parametrize("module", ["sightline", "sightline.kubernetes.rayjob"])
def test_modules_that_are_run_with_m(hostile: Path, module: str) -> None:
    result = run(hostile, "-m", module, "--help", PYTHONPATH=".")
    assert (result.returncode, "Usage" in result.stdout) == (0, True), result.stderr


def test_a_module_that_is_imported_already_is_named(tmp_path: Path) -> None:
    (tmp_path / "storage.py").write_text("")
    result = run(tmp_path, "-c", "import storage, sightline")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: sightline has a package named 'storage'"), result.stderr
    assert last.endswith(f"({tmp_path / 'storage.py'}): rename that module"), last
    assert run(tmp_path, "-c", "import pipelines, sightline").returncode == 0, "Sightline's own, imported before"


def test_a_decoders_process(hostile: Path) -> None:
    code = (
        "import sightline\n"
        "from siglip.config import ImageSpec, Limits\n"
        "from siglip.images.decoder import Decoder\n"
        "decoder = Decoder(ImageSpec(size=16, mean=(0.5,) * 3, std=(0.5,) * 3), Limits())\n"
        "print(decoder.decode([b'']))"
    )
    result = run(hostile, "-c", code, PYTHONPATH=".")
    assert (result.returncode, "ImageRejected('empty'" in result.stdout) == (0, True), result.stderr
