"""A run in waves loads the model once, and has each row once, also after kills and in several parts."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from pipelines import cluster, committer, job, preparation
from pipelines.committer import Committer
from pipelines.job import Outcome, run_job
from pipelines.limit import NO_LIMIT, Limit
from pipelines.planning.plan import ShardRef
from tests.support.jobs import Place, RecordedProgress, make_image
from tests.support.workers import read_titles

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
SHARDS, ROWS = 7, 14
ONE_ACTOR = {"actors.min": 1, "actors.max": 1}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Seven shards of two images, in four waves."""
    for module in (cluster, preparation, job):
        monkeypatch.setattr(module, "WAVE_BLOCKS", 2)
    made = Place(str(tmp_path), tmp_path)
    for number in range(ROWS):
        made.put(f"{number:02}.jpg", make_image(number))
    made.keys = {"rows_per_shard": 2}
    return made


def run(place: Place, limit: Limit = NO_LIMIT) -> Outcome:
    config = place.config()
    one = config.actors.model_copy(update={"min": 1, "max": 1})
    return run_job(config.model_copy(update={"actors": one}), RecordedProgress(), None, limit)


def check(place: Place, rows: int = ROWS) -> None:
    report = place.verify()
    assert (report.rows_tagged, report.duplicates, report.orphans) == (rows, 0, 0), report.problems
    assert report.ok == (rows == ROWS), report.problems
    assert set(place.keys_of("data").values()) == {1}
    assert place.parts() == []


def watch_waves(monkeypatch: pytest.MonkeyPatch, begin: Callable[[int], object]) -> list[list[str]]:
    """Call `begin` with the number of each wave before it begins. Return the list of the waves' shards."""
    waves: list[list[str]] = []
    expect = Committer.expect

    def expect_and_note(self: Committer, shards: list[ShardRef]) -> None:
        begin(len(waves))
        waves.append([ref.shard[-1] for ref in shards])
        expect(self, shards)

    monkeypatch.setattr(committer.Committer, "expect", expect_and_note)
    return waves


def test_the_waves_of_a_run_load_the_model_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    waves = watch_waves(monkeypatch, lambda number: None)
    outcome = run(place)
    assert waves == [["0", "1"], ["2", "3"], ["4", "5"], ["6"]]
    assert (outcome.new_shards, outcome.left, outcome.waiting) == (SHARDS, 0, [])
    assert len(outcome.manifest["run"]["actors"]) == 1
    assert outcome.manifest["ledgers"] == 1
    check(place)


def find_actors() -> list[psutil.Process]:
    below = psutil.Process().children(recursive=True)
    return [one for one, title in read_titles(below) if title.startswith("ray::") and "Tagger" in title]


def test_an_actor_that_dies_between_two_waves_is_started_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []

    def kill(wave: int) -> None:
        if wave in (1, 3):
            gc.collect()  # the dataset before, with the arguments of its actors
            actors = find_actors()
            assert actors
            for actor in actors:
                killed.append(actor.pid)
                actor.kill()
            psutil.wait_procs(actors, timeout=60)

    watch_waves(monkeypatch, kill)
    outcome = run(place)
    assert (outcome.new_shards, outcome.waiting) == (SHARDS, [])
    assert len(set(killed)) == 2
    assert len(outcome.manifest["run"]["actors"]) == 3
    check(place)


KILLED = """
import os, signal, sys
from pipelines import cluster, committer, job, preparation
from sightline.cli import app
for module in (cluster, preparation, job):
    module.WAVE_BLOCKS = 2
wave, receive, expect = 0, committer.Committer.receive, committer.Committer.expect
def count(self, shards):
    global wave
    wave += 1
    expect(self, shards)
def die(self, receipt):
    if wave == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return receive(self, receipt)
last = int(sys.argv[-1])
committer.Committer.expect, committer.Committer.receive = count, die
app(sys.argv[1:-1])
"""


def run_killed(place: Place, wave: int) -> None:
    """Run the job in a process of its own, on the same Ray, which is killed at the first receipt of a wave."""
    words = [f"{key}={value}" for key, value in {**ONE_ACTOR, "actors.num_cpus": 1, "ray.readers": 2}.items()]
    settings = [word for one in words for word in ("--set", one)]
    command = [sys.executable, "-c", KILLED, "tag", str(place.configure()), *settings, str(wave)]
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(command, env={**os.environ, "RAY_ADDRESS": address}, capture_output=True, timeout=500)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_killed_in_each_wave_nothing_is_lost_or_doubled(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for wave, least in ((1, 0), (3, 3), (2, 4)):
        run_killed(place, wave)
        report = place.verify()
        assert report.duplicates == 0
        assert report.committed >= least, "the shards of earlier waves are committed, but for those of the last moment"
        if report.committed == SHARDS:  # a commit may end after its driver
            break
    outcome = run(place)
    assert outcome.manifest["shards"] == SHARDS
    check(place)


def test_a_part_of_the_work_and_the_rest(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    waves = watch_waves(monkeypatch, lambda number: None)
    words: list[Any] = [word for key, value in ONE_ACTOR.items() for word in ("--set", f"{key}={value}")]
    done = place.tag("--limit", "5", "--newest-first", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert waves == [["6", "5"], ["4"]]
    assert "4 shards are left: run the same command again" in done.stdout
    check(place, 6)
    done = place.tag("--for", "0.001s", *words)
    assert (done.returncode, len(waves)) == (0, 2), done.stdout + done.stderr
    assert "4 shards are left" in done.stdout
    check(place, 6)
    done = place.tag("--for", "1d", "--limit", "1", *words)
    assert (done.returncode, waves[2:]) == (0, [["0"]])
    assert "3 shards are left" in done.stdout
    done = place.tag(*words)
    assert (done.returncode, waves[3:]) == (0, [["1", "2"], ["3"]])
    assert "left" not in done.stdout
    check(place)
    done = place.tag("--limit", "5", *words)
    assert (done.returncode, "nothing to do" in done.stdout) == (0, True)


def test_a_run_whose_time_is_over_in_a_wave_ends_at_its_shards(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards of the wave that are not begun are left, and are no error."""
    waves = watch_waves(monkeypatch, lambda number: None)

    def replace_in_second_wave(reader: Any, **keys: Any) -> Any:
        return replace(reader, **keys, deadline=1.0 if len(waves) == 2 else None)

    with monkeypatch.context() as patch:
        patch.setattr(job, "replace", replace_in_second_wave)
        outcome = run(place)
    assert (outcome.new_shards, outcome.left, outcome.waiting, len(waves)) == (2, 5, [], 2)
    assert outcome.manifest["run"]["stopped"]
    check(place, 4)
    assert run(place).new_shards == 5
    check(place)
