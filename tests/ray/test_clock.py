"""A clock that jumps by a day, between runs and within them: only the times that are told are wrong."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.committer import Committer
from tests.support.jobs import Place, make_image, run_sightline
from tests.support.tars import make_tar

DAY = 86_400.0
TARS, PER_TAR = 9, 3
KEYS = {"rows_per_shard": PER_TAR, "cost": {"per_hour": 10}}


class Clock:
    """The clock of this process as Sightline's modules see it: `ahead` seconds ahead of the real one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        clock = self

        class Shifted(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
                return datetime.now(tz) + timedelta(seconds=clock.ahead)

        times = SimpleNamespace(**{**vars(time), "time": lambda: time.time() + clock.ahead})
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in ("pipelines", "sightline"):
                for attribute, value in list(vars(module).items()):
                    if value is datetime:
                        patch.setattr(module, attribute, Shifted)
                    elif value is time:
                        patch.setattr(module, attribute, times)


def add_tars(place: Place, name: str) -> Counter[str]:
    """Write tars of images, and return their keys."""
    for tar in range(TARS):
        images = [(f"{name}-{tar}-{number}.jpg", make_image(1000 * tar + number)) for number in range(PER_TAR)]
        place.put(f"{name}-{tar}.tar", make_tar(images))
    return Counter(f"{name}-{tar}-{number}" for tar in range(TARS) for number in range(PER_TAR))


def jump_in_the_middle(clock: Clock, days: float, patch: pytest.MonkeyPatch) -> None:
    """Let the clock jump when the first commit of the next run is counted."""
    count: Callable[..., Any] = Committer._count

    def count_and_jump(committer: Committer, done: list[Any]) -> None:
        count(committer, done)
        if done and committer._report.shards:
            clock.ahead += days * DAY
            patch.setattr(Committer, "_count", count)

    patch.setattr(Committer, "_count", count_and_jump)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_clock_that_jumps_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(str(tmp_path), tmp_path)
    clock = Clock(monkeypatch)
    expected: Counter[str] = Counter()
    today = datetime.now(UTC).date()
    # Days that the clock is ahead when a run begins, and by how many more it jumps within the run.
    for number, (before, within) in enumerate([(0, 0), (-1, 0), (1, 0), (0, 1), (0, -1), (3, -4)]):
        expected += add_tars(place, f"{number}")
        clock.ahead = before * DAY
        with monkeypatch.context() as patch:
            if within:
                jump_in_the_middle(clock, within, patch)
            done = place.tag(**KEYS)
            assert done.returncode == 0, done.stdout + done.stderr
            assert clock.ahead == (before + within) * DAY
        assert place.keys_of("data") == expected
        assert place.verify().ok, place.verify().problems
        manifest = json.loads((tmp_path / "output/manifest.json").read_text())
        run = manifest["run"]
        assert run["shards"] == TARS
        assert len(manifest["runs"]) == number + 1
        assert 0 <= run["hours"] < 0.2, run
        assert 0 <= run["cost"] < 2
        assert 0 < run["images_per_second"] < 10_000, run
        done = run_sightline("compact", place.output)
        assert done.returncode == 0, done.stderr
        assert place.keys_of("data") == expected
        assert place.verify().ok, place.verify().problems
        for day in ("today", "yesterday", str(today)):
            done = run_sightline("verify", place.output, "--since", day)
            begun = day != str(today) or clock.ahead >= 0  # by this machine's clock
            assert done.returncode == (0 if begun else 2), (day, done.stdout, done.stderr)
        assert "nothing to do" in place.tag(**KEYS).stdout
