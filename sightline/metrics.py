"""A run's numbers for Prometheus, through the metrics agent of the cluster that it runs on.

Names begin with `ray_sightline_run_` where Prometheus reads them. They are there while the driver is; what a run came
to is in its manifest. k8s/alerts.yaml watches them.
"""

from __future__ import annotations

import time

from ray.util.metrics import Gauge

from pipelines.run_report import Progress


class RunMetrics:
    """A `pipelines.run_report.Progress` that passes everything on to another, and keeps gauges of it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._counts = {"rows": 0, "rejects": 0, "shards": 0, "waiting_shards": 0}
        self._gauges: dict[str, Gauge] = {}

    def start(self, shards: int, rows: int) -> None:
        """Work begins: this many shards, and about this many images."""
        self._progress.start(shards, rows)
        about = {
            "rows": "Images written by this run, rejected ones included.",
            "rejects": "Images rejected by this run.",
            "shards": "Shards committed by this run.",
            "waiting_shards": "Shards that this run left to the next one, because the store could not give them.",
            "planned_shards": "Shards that this run has to do.",
            "last_commit_seconds": "Unix time of this run's last commit, or of its beginning.",
        }
        self._gauges = {name: Gauge(f"sightline_run_{name}", text) for name, text in about.items()}
        self._gauges["planned_shards"].set(shards)
        self._gauges["last_commit_seconds"].set(time.time())
        for name, count in self._counts.items():
            self._gauges[name].set(count)

    def say(self, message: str) -> None:
        """A step that takes a while."""
        self._progress.say(message)

    def update(self, *, rows: int = 0, rejects: int = 0, shards: int = 0, waiting: int = 0) -> None:
        """So much more is done: rows written, of them rejected, shards committed, shards left to the next run."""
        self._progress.update(rows=rows, rejects=rejects, shards=shards, waiting=waiting)
        changes = {"rows": rows, "rejects": rejects, "shards": shards, "waiting_shards": waiting}
        for name, count in changes.items():
            if count:
                self._counts[name] += count
                self._gauges[name].set(self._counts[name])
        if shards:
            self._gauges["last_commit_seconds"].set(time.time())
