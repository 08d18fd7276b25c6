"""What a run did and how long each stage took; and what it tells while it runs."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

STAGES = ("read", "decode", "queue", "model", "write")


class Progress(Protocol):
    """What a run tells while it runs."""

    def start(self, shards: int, rows: int) -> None:
        """Work begins: this many shards, and about this many images."""

    def say(self, message: str) -> None:
        """A step that takes a while."""

    def update(self, *, rows: int = 0, rejects: int = 0, shards: int = 0, waiting: int = 0) -> None:
        """So much more is done: rows written, of them rejected, shards committed, shards left to the next run."""


@dataclass
class RunReport:
    """What one run measured. `lost` is about how many images went with broken archives, beyond their reject rows."""

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
        """Take a receipt in."""
        self.tagged += receipt["tagged"]
        self.rejected += receipt["rejected"]
        self.rows += receipt["tagged"] + receipt["rejected"]
        self.actors.update(receipt["actors"])
        self.working = min(self.working, receipt["started_at"] or self.working)
        for stage in STAGES:
            self.seconds[stage] += receipt[f"{stage}_s"]

    def rejected_fraction(self) -> float:
        """The share of this run's images that were rejected. An archive that broke counts with what it held."""
        return (self.rejected + self.lost) / max(1, self.rows + self.lost)

    def summarize(self, readers: int, decoders: int) -> dict[str, Any]:
        """For the manifest. What limited the run is the stage whose workers were busiest; waiting is no work."""
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
