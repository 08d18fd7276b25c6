"""The report of a run: how many images it processed, how long each stage took, and which stage limited it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

STAGES = ("read", "decode", "queue", "model", "write")


@dataclass
class RunReport:
    """The counts and times of one run.

    `started` and `working` are the Unix times of the start and of the first decoded image. `rows` are images read,
    `tagged` and `rejected` of them. `lost` estimates the images that broken archives held beyond their reject row.
    `shards` counts commits. `seconds` are the seconds of work by stage, over all workers.
    """

    started: float = field(default_factory=time.time)
    working: float = float("inf")
    rows: int = 0
    tagged: int = 0
    rejected: int = 0
    lost: int = 0
    shards: int = 0
    seconds: Counter[str] = field(default_factory=Counter)
    actors: set[str] = field(default_factory=set)

    def add(self, receipt: dict[str, Any]) -> None:
        """Add a receipt (see `pipelines.stages.sink.RECEIPT_SCHEMA`)."""
        self.tagged += receipt["tagged"]
        self.rejected += receipt["rejected"]
        self.rows += receipt["tagged"] + receipt["rejected"]
        self.actors.update(receipt["actors"])
        self.working = min(self.working, receipt["started_at"] or self.working)
        for stage in STAGES:
            self.seconds[stage] += receipt[f"{stage}_s"]

    def rejected_fraction(self) -> float:
        """Return the rejected part of this run's images, from 0 to 1. Images lost in broken archives count."""
        return (self.rejected + self.lost) / max(1, self.rows + self.lost)

    def summarize(self, readers: int, decoders: int) -> dict[str, Any]:
        """Return the report for the manifest. `readers` and `decoders` are the workers of these stages.

        `limited_by` is the stage whose workers were busy for the largest part of the time. `queue` is waiting time, so
        it is never the limit.
        """
        now = time.time()
        working = min(self.working, now)
        wall = max(now - working, 1e-9)
        workers = {"read": readers, "decode": decoders, "model": max(1, len(self.actors)), "write": 1}
        busy = {stage: self.seconds[stage] / (wall * count) for stage, count in workers.items()}
        return {
            "shards": self.shards,
            "rows": self.rows,
            "rows_tagged": self.tagged,
            "rows_rejected": self.rejected,
            "images_lost": self.lost,
            "startup_seconds": round(working - self.started, 3),
            "seconds": round(wall, 3),
            "stage_seconds": {stage: round(self.seconds[stage], 3) for stage in STAGES},
            "busy": {stage: round(share, 3) for stage, share in busy.items()},
            "limited_by": max(busy, key=lambda stage: busy[stage]),
            "images_per_second": round(self.rows / wall, 2),
            "actors": sorted(self.actors),
        }
