"""Markers: who is at work on an output, and who has ended without a word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipelines.output import markers
from pipelines.output.markers import FORGOTTEN, Marker, make_marker, marker_path, read_markers
from pipelines.output.output import Output


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(str(tmp_path))


def write_in_another_process(output: Output, then: str = "") -> subprocess.Popen[str]:
    code = f"""
import sys
from pipelines.output.markers import make_marker
from pipelines.output.output import Output
make_marker("other", "compaction").renew([3, 5]).write(Output(sys.argv[1]))
print("written", flush=True)
{then}
"""
    process = subprocess.Popen([sys.executable, "-c", code, output.uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    return process


def test_a_process_at_work_is_not_over_until_it_ends(output: Output) -> None:
    process = write_in_another_process(output, "sys.stdin.read() if sys.stdin else None\nimport time; time.sleep(600)")
    [marker] = read_markers(output)
    assert (marker.id, marker.kind, marker.segments) == ("other", "compaction", (3, 5))
    assert marker.pid == process.pid
    process.kill()
    process.communicate()
    assert marker.is_over()


def test_this_process_is_at_work(output: Output) -> None:
    make_marker("mine", "run").renew([0]).write(output)
    [marker] = read_markers(output)
    assert not marker.is_over()
    assert marker.ended is None
    assert abs(datetime.now(UTC) - marker.started_at) < timedelta(minutes=5)


def test_a_number_that_another_process_has_now_is_not_the_process(output: Output) -> None:
    marker = make_marker("mine", "run")
    assert replace(marker, process=f"{os.getpid()} 1").is_over()


def test_of_a_process_elsewhere_only_its_silence_tells(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = replace(make_marker("mine", "run"), place="another boot pid:[1]", process="1 1")
    assert not marker.is_over()
    assert replace(marker, updated_at=datetime.now(UTC) - FORGOTTEN).is_over()
    # Where processes cannot be identified, such as on macOS.
    monkeypatch.setattr(markers, "_describe_place", lambda: "")
    assert not make_marker("mine", "run").is_over()


def test_an_interrupted_run_tells_of_itself(output: Output) -> None:
    make_marker("mine", "run").renew([1], {"rows": 7, "hours": 0.5}).write(output)
    [marker] = read_markers(output)
    assert (marker.is_over(), marker.ended) == (True, {"rows": 7, "hours": 0.5})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"segments": [0]}',
        '{"segments": 3, "updated_at": "2026-01-01"}',
        '{"updated_at": 3}',
        "\x00",
    ],
)
def test_a_marker_that_cannot_be_read_is_over(output: Output, text: str) -> None:
    output.store.put(output.uri_of(marker_path("x")), text.encode())
    assert list(read_markers(output)) == [Marker("x")]
    assert Marker("x").is_over()


def test_the_marker_of_an_earlier_version_is_read(output: Output) -> None:
    now = datetime.now(UTC).isoformat()
    output.store.put(output.uri_of(marker_path("x")), json.dumps({"segments": [4], "updated_at": now}).encode())
    [marker] = read_markers(output)
    assert (marker.segments, marker.is_over()) == ((4,), False)
