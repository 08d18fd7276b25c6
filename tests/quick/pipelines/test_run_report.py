"""The report of a run: one throughput, and the stage that limited the run, or none where that is not known."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from pipelines.run_report import KNOWN_RECEIPTS, KNOWN_SECONDS, RunReport
from sightline.progress import RunProgress

ROWS = 300
READERS, DECODERS, ACTORS, WRITERS = 4, 8, 2, 4


class Clock:
    """A clock that stands, unless it is moved. `jumped` are the seconds by which it was set."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.jumped = 0.0

    def time(self) -> float:
        return self.now + self.jumped

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("pipelines.run_report.time", clock)
    return clock


def receipt(number: int, started: float, **seconds: float) -> dict[str, Any]:
    """A receipt for `ROWS` images, with seconds of work by stage."""
    stages = {f"{name}_s": seconds.get(name, 0.0) for name in ("read", "decode", "queue", "model", "write")}
    actors = [f"actor {number % ACTORS}"]
    return {"tagged": ROWS - 1, "rejected": 1, "actors": actors, "started_at": started, **stages}


def run(clock: Clock, seconds: float, busy: dict[str, float], receipts: int = 100, loading: float = 0.0) -> RunReport:
    """A run with receipts at equal intervals, in which stages were busy for these shares of the time.

    `loading` seconds pass between the first decoded image and the first receipt: the model is loaded meanwhile.
    """
    clock.now = 1000.0
    report = RunReport(started=clock.now)
    begin = clock.now + 5
    clock.now = begin + loading
    interval = seconds / receipts
    workers = {"read": READERS, "decode": DECODERS, "model": ACTORS, "write": WRITERS}
    work = {stage: share * interval * workers[stage] for stage, share in busy.items()}
    for number in range(receipts + 1):
        report.add(receipt(number, begin + number * interval, queue=1000.0, **work))
        clock.now += interval
    clock.now -= interval
    report.add_commit()
    return report


def limit(report: RunReport) -> str | None:
    found: str | None = report.summarize(READERS, DECODERS, WRITERS)["limited_by"]
    return found


@pytest.mark.parametrize("stage", ["read", "decode", "model", "write"])
def test_the_stage_that_never_waits_is_the_limit(clock: Clock, stage: str) -> None:
    busy = dict.fromkeys(("read", "decode", "model", "write"), 0.2) | {stage: 0.97}
    report = run(clock, 60, busy)
    summary = report.summarize(READERS, DECODERS, WRITERS)
    assert summary["limited_by"] == stage
    assert summary["busy"] == pytest.approx(busy, abs=0.02)


def test_several_writers_that_each_write_now_and_then_are_no_limit(clock: Clock) -> None:
    """Four writers work for a quarter of the time each: once that counted as one writer that never waits."""
    assert limit(run(clock, 60, {"decode": 0.9, "write": 0.25})) == "decode"
    assert limit(run(clock, 60, {"decode": 0.5, "write": 0.25})) is None


@pytest.mark.parametrize(
    "busy",
    [
        {"read": 0.5, "decode": 0.5, "model": 0.5, "write": 0.5},
        {"decode": 0.95, "model": 0.93},
        {"decode": 0.6, "model": 0.1},
        {},
    ],
)
def test_no_stage_is_named_where_none_stands_out(clock: Clock, busy: dict[str, float]) -> None:
    assert limit(run(clock, 60, busy)) is None


def test_no_stage_is_named_for_a_run_that_was_too_short(clock: Clock) -> None:
    busy = {"write": 0.99}
    assert limit(run(clock, KNOWN_SECONDS + 1, busy)) == "write"
    assert limit(run(clock, KNOWN_SECONDS - 1, busy)) is None
    assert limit(run(clock, 60, busy, receipts=KNOWN_RECEIPTS - 2)) is None
    assert limit(run(clock, 60, busy, receipts=KNOWN_RECEIPTS)) == "write"


def test_the_time_in_which_the_model_is_loaded_is_not_the_models_waiting(clock: Clock) -> None:
    """Images are decoded meanwhile, until the buffers are full."""
    assert limit(run(clock, 60, {"model": 0.97, "decode": 0.5}, loading=60)) == "model"


@pytest.mark.parametrize("wrong", [-86_400.0, -2.0, 0.0, 2.0, 86_400.0])
def test_a_clock_that_is_set_and_workers_with_other_clocks_change_no_throughput(clock: Clock, wrong: float) -> None:
    report = RunReport(started=clock.now)
    clock.jumped = wrong
    clock.now += 10
    for _ in range(10):
        report.add(receipt(0, clock.now - 1 + wrong))
        clock.now += 10
    report.add_commit()
    assert report.elapsed() == 110
    assert report.summarize(1, 1, 1)["seconds"] == pytest.approx(105, abs=5)
    assert 0 <= report.summarize(1, 1, 1)["startup_seconds"] <= 10


def test_a_run_without_an_image_has_a_report(clock: Clock) -> None:
    report = RunReport(started=clock.now)
    summary = report.summarize(1, 1, 1)
    assert (summary["limited_by"], summary["images_per_second"], summary["seconds"]) == (None, 0.0, 0.0)
    assert summary["startup_seconds"] == 0.0
    report.add({**receipt(0, 0.0, read=1.0), "tagged": 0, "rejected": 0, "started_at": None})
    assert report.summarize(1, 1, 1)["busy"] == {"read": 0.0, "decode": 0.0, "model": 0.0, "write": 0.0}


def test_the_progress_and_the_summary_give_one_throughput(clock: Clock) -> None:
    """The last line of the progress is printed at the last commit. The summary is made later."""
    report = run(clock, 50, {"model": 0.5})
    text = io.StringIO()
    with RunProgress(Console(file=text, width=200)) as progress:
        progress.start(1, report.rows)
        progress.update(rows=report.rows, rejects=report.rejected, shards=1, rate=report.rate())
    clock.now += 7
    rate = report.summarize(READERS, DECODERS, WRITERS)["images_per_second"]
    assert rate == pytest.approx(report.rows / 50)
    assert f" {rate:,.1f}/s" in text.getvalue()
