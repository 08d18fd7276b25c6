"""SIGTERM: a job ends within the grace period, keeps the committed shards, and the next run continues it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pipelines.output.output import Output
from pipelines.upkeep.verify import verify_output
from sightline import api
from sightline.demo.dataset import CONFIG
from tests.ray.test_cluster import PER_TAR, make_tars
from tests.support.ray_cluster import SIGHTLINE, RayCluster

TARS = 10
GRACE_SECONDS = 30
"""Kubernetes' default terminationGracePeriodSeconds."""


def wait_for_commits(driver: subprocess.Popen[str], output: Path, count: int) -> None:
    deadline = time.monotonic() + 180
    while len(list(output.glob("commits/*.json"))) < count:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, f"fewer than {count} commits in time"
        time.sleep(0.05)


@pytest.mark.parametrize("where", ["here", "cluster"])
def test_a_run_that_sigterm_ended_is_finished_by_the_next(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cluster: RayCluster | None = request.getfixturevalue("ray_cluster") if where == "cluster" else None
    make_tars(tmp_path / "input", TARS)
    output = tmp_path / "output"
    command = [SIGHTLINE, "tag", str(CONFIG), "--input", str(tmp_path / "input"), "--output", str(output)]
    command += ["--set", f"rows_per_shard={PER_TAR}", "--set", "max_reject_fraction=1", "--set", "actors.num_cpus=1"]
    command += ["--set", "model.device=cpu"]  # the cluster's GPU is only a number

    def start() -> subprocess.Popen[str]:
        if cluster:
            return cluster.start(*command)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    driver = start()
    try:
        wait_for_commits(driver, output, 2)
        below = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGTERM)
        said = driver.communicate(timeout=GRACE_SECONDS)[0]
    finally:
        driver.kill()
    assert driver.returncode == 143, said
    assert "terminated: what is committed stays" in said
    assert "Traceback" not in said
    _, left = psutil.wait_procs(below, timeout=10)
    assert not left
    kept = {path: path.stat().st_mtime_ns for path in output.glob("commits/*.json")}
    assert 2 <= len(kept) < TARS
    driver = start()
    said = driver.communicate(timeout=240)[0]
    assert driver.returncode == 0, said
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    report = verify_output(Output(str(output)))
    assert report.ok, report.problems
    assert report.rows_in == TARS * PER_TAR


@pytest.mark.parametrize(
    ("sent", "codes"),
    [
        ([signal.SIGINT, signal.SIGINT, signal.SIGINT], {130}),
        ([signal.SIGHUP, signal.SIGINT], {129, 130}),  # a busy machine may deliver them in the other order
        ([signal.SIGTERM], {143}),  # as systemd does, to all processes of a unit
    ],
)
def test_further_signals_change_nothing_and_the_status_knows_the_run(
    sent: list[signal.Signals], codes: set[int], tmp_path: Path
) -> None:
    make_tars(tmp_path / "input", TARS)
    output = tmp_path / "output"
    command = [SIGHTLINE, "tag", str(CONFIG), "--input", str(tmp_path / "input"), "--output", str(output)]
    command += ["--set", f"rows_per_shard={PER_TAR}", "--set", "max_reject_fraction=1", "--set", "ray.readers=1"]
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        wait_for_commits(driver, output, 2)
        for number in sent:
            os.killpg(driver.pid, number)  # as a terminal does
            time.sleep(0.3)
        said = driver.communicate(timeout=GRACE_SECONDS)[0]
    finally:
        driver.kill()
    assert driver.returncode in codes, said
    assert "what is committed stays" in said
    assert "Traceback" not in said
    committed = len(list(output.glob("commits/*.json")))
    status = api.status(output)
    assert (status.planned, status.committed, status.rows_in) == (TARS, committed, committed * PER_TAR)
    assert (status.under_way, status.killed) == ([], [])
    [run] = status.runs
    assert run["stopped"]
    assert run["rows"] >= run["shards"] * PER_TAR > 0
    assert subprocess.run(command, capture_output=True, timeout=240).returncode == 0
    status = api.status(output)
    assert (status.planned, status.committed) == (TARS, TARS)
    assert [one["stopped"] for one in status.runs] == [False, True]
    assert not (output / "runs").exists()


def test_sigterm_during_the_start_ends_the_run(tmp_path: Path) -> None:
    make_tars(tmp_path / "input", TARS)
    command = [SIGHTLINE, "tag", str(CONFIG), "--input", str(tmp_path / "input"), "--output", str(tmp_path / "output")]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert driver.stdout
    try:
        for line in driver.stdout:
            if "starting Ray" in line:
                break
        driver.send_signal(signal.SIGTERM)
        said = driver.communicate(timeout=GRACE_SECONDS)[0]
    finally:
        driver.kill()
    assert driver.returncode == 143, said
