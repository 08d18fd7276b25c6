"""The installed wheel has all data files. Its code runs even if the working directory has modules of the same names."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.images import encode, make_rgb
from tests.support.ports import free_port
from tests.support.ray_cluster import RayCluster
from tests.wheel.conftest import REPOSITORY, SOURCES, Wheel

NOT_INSTALLED = {"README.md", "kustomization.yaml", "serve/grafana/dashboard.json"}
"""Files of the packages that only readers, `kubectl` and Grafana use, by name or by path."""


@pytest.fixture(params=["wheel", "editable"])
def command(request: pytest.FixtureRequest, wheel: Wheel) -> list[str]:
    """The command that starts Sightline: the wheel's, and `python -m sightline` of this editable installation."""
    return [str(wheel.commands / "sightline")] if request.param == "wheel" else [sys.executable, "-m", "sightline"]


@pytest.fixture
def job(hostile: Path) -> Path:
    """A job over two images, in the hostile folder."""
    (hostile / "input").mkdir()
    for name in ("a", "b"):
        (hostile / f"input/{name}.png").write_bytes(encode(make_rgb()))
    file = hostile / "job.yaml"
    file.write_text(yaml.safe_dump({"input": "input", "output": "output", "labels": ["cat", "dog"]}))
    return file


def run(folder: Path, *command: str | Path) -> str:
    """Run a command in `folder`, which is also on PYTHONPATH. Returns its stdout. Fails if the command fails."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_contains_every_data_file(wheel: Wheel) -> None:
    inside = set(zipfile.ZipFile(wheel.file).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", *SOURCES], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    wanted = {
        path
        for path in tracked
        if "/" in path and not {path, path.rpartition("/")[2]} & NOT_INSTALLED and (REPOSITORY / path).exists()
    }
    assert "siglip/checkpoints/tiny/model.safetensors" in wanted
    assert not wanted - inside
    assert {path.partition("/")[0] for path in inside} - {f"sightline-{_version(wheel)}.dist-info"} == {
        path.partition("/")[0] for path in wanted
    }


def test_imports_find_the_wheels_modules_and_not_the_working_directorys(wheel: Wheel, hostile: Path) -> None:
    code = "import sightline, storage, serve.app, pipelines.job; print(storage.__file__, serve.__file__, sep='\\n')"
    for path in run(hostile, wheel.commands / "python", "-c", code).splitlines():
        assert Path(path).is_relative_to(wheel.commands.parent), path


def test_the_demo_and_its_report_succeed(wheel: Wheel, hostile: Path) -> None:
    sightline = wheel.commands / "sightline"
    printed = run(hostile, sightline, "demo")
    assert "verify: ok, 612 rows in = 607 tagged + 5 rejected" in printed
    suggested = re.findall("^see it: sightline (report .+), then open (.+)$", printed, re.MULTILINE)
    assert suggested == [("report demo/output --to demo/report.html", "demo/report.html")]
    run(hostile, sightline, *suggested[0][0].split())
    assert "data:image/jpeg;base64," in (hostile / suggested[0][1]).read_text(), "the report must contain thumbnails"


def test_a_job_and_its_verification_succeed(command: list[str], job: Path) -> None:
    assert "2 tagged, 0 rejected" in run(job.parent, *command, "tag", job)
    assert "problems" not in run(job.parent, *command, "verify", "output")


def test_a_job_on_a_joined_cluster_succeeds(job: Path) -> None:
    """The hostile folder is also on the PYTHONPATH of the nodes."""
    with RayCluster({"PYTHONPATH": str(job.parent)}) as cluster:
        cluster.add_worker("workers", 3)
        result = subprocess.run(
            [sys.executable, "-m", "sightline", "tag", str(job)],
            cwd=job.parent,
            env={**cluster.env, "RAY_ADDRESS": cluster.address},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert result.returncode == 0, result.stderr
    assert "2 tagged, 0 rejected" in result.stdout


def test_the_endpoint_serves_a_request_and_stops_without_an_error(command: list[str], hostile: Path) -> None:
    port = free_port()
    config = REPOSITORY / "configs/endpoint.yaml"
    process = subprocess.Popen(
        [*command, "serve", str(config), "--port", str(port)],
        cwd=hostile,
        env={**os.environ, "PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith(f"ready: http://127.0.0.1:{port} "), line or process.stderr.read()
        files = {"image": ("a.png", encode(make_rgb()), "image/png")}
        response = httpx.post(
            f"http://127.0.0.1:{port}/v1/classify", files=files, data={"label_set": "shapes"}, timeout=60
        )
        assert response.status_code == 200, response.text
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def _version(wheel: Wheel) -> str:
    return wheel.file.name.split("-")[1]
