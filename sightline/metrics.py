"""Gauges of a run for Prometheus, exported by the metrics agent of the Ray cluster that the run uses.

Prometheus reads them under names that begin with `ray_sightline_run_`. They exist as long as the driver process; the
final counts of a run are in its manifest. k8s/alerts.yaml has alerts on them.
"""

from __future__ import annotations

import time

from ray.util.metrics import Gauge

from pipelines.progress import Progress


class RunMetrics:
    """A `pipelines.progress.Progress` that sets gauges, and passes each call on to another `Progress`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._counts = {"rows": 0, "rejects": 0, "shards": 0, "waiting_shards": 0}
        self._gauges: dict[str, Gauge] = {}

    def start(self, shards: int, rows: int) -> None:
        """Make the gauges: work begins on this many shards with about this many images."""
        self._progress.start(shards, rows)
        descriptions = {
            "rows": "Images written by this run, rejected ones included.",
            "rejects": "Images rejected by this run.",
            "shards": "Shards committed by this run.",
            "waiting_shards": "Shards left to the next run, because their inputs could not be read.",
            "planned_shards": "Shards that this run has to do.",
            "last_commit_seconds": "Unix time of this run's last commit, or of its start before the first commit.",
        }
        self._gauges = {name: Gauge(f"sightline_run_{name}", text) for name, text in descriptions.items()}
        self._gauges["planned_shards"].set(shards)
        self._gauges["last_commit_seconds"].set(time.time())
        for name, count in self._counts.items():
            self._gauges[name].set(count)

    def say(self, message: str) -> None:
        """Pass on the step that begins."""
        self._progress.say(message)

    def update(
        self, *, rows: int = 0, rejects: int = 0, shards: int = 0, waiting: int = 0, rate: float | None = None
    ) -> None:
        """Add rows written, how many of these are rejects, shards committed, and shards left to the next run."""
        self._progress.update(rows=rows, rejects=rejects, shards=shards, waiting=waiting, rate=rate)
        changes = {"rows": rows, "rejects": rejects, "shards": shards, "waiting_shards": waiting}
        for name, count in changes.items():
            if count:
                self._counts[name] += count
                self._gauges[name].set(self._counts[name])
        if shards:
            self._gauges["last_commit_seconds"].set(time.time())
