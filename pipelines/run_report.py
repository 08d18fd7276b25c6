"""The report of a run: how many images it processed, how long each stage took, and which stage limited it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STAGES = ("read", "decode", "queue", "model", "write")
KNOWN_SECONDS, KNOWN_RECEIPTS = 20.0, 20
"""The shortest run whose limit is named. In a shorter one, filling and emptying the pipeline counts too much."""
LIMIT_BUSY, LIMIT_LEAD = 0.75, 0.15
"""A stage is the limit if its workers were busy for this share of the time, and for so much more than any others."""


TROUBLE_LISTED = 100
"""The most hosts with trouble that the manifest names."""
HOSTS, OTHER_HOSTS = 10_000, "other hosts"
"""The most hosts with trouble that are counted one by one, and what the others are counted as."""


@dataclass
class RunReport:
    """The counts and times of one run.

    `started`, `working` and `received` are the Unix times of the start, of the first decoded image and of the first
    receipt, and `ended` is the time of the latest receipt or commit. All are by the clock of this machine at the start
    of the run: it may be set during the run, and the clocks of the workers may differ. `rows` are images read, `tagged`
    and `rejected` of them. `lost` estimates the images that broken archives held beyond their reject row. `trouble`
    counts the rejected rows that a later run tries again, by their host and what it did; it has up to `HOSTS` of them.
    `shards` counts commits, and `receipts` counts receipts. `seconds` are the seconds of work by stage, over all
    workers.
    """

    started: float = field(default_factory=time.time)
    working: float = float("inf")
    received: float = float("inf")
    ended: float = 0.0
    rows: int = 0
    tagged: int = 0
    rejected: int = 0
    lost: int = 0
    shards: int = 0
    receipts: int = 0
    trouble: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    actors: set[str] = field(default_factory=set)
    _began: float = field(default_factory=lambda: time.monotonic())
    _early: Counter[str] = field(default_factory=Counter)
    """The seconds of the first receipt's work, which was done before it was received."""

    def add(self, receipt: dict[str, Any]) -> None:
        """Add a receipt (see `pipelines.stages.sink.RECEIPT_SCHEMA`)."""
        self.tagged += receipt["tagged"]
        self.rejected += receipt["rejected"]
        self.rows += receipt["tagged"] + receipt["rejected"]
        self.actors.update(receipt["actors"])
        for stage in STAGES:
            self.seconds[stage] += receipt[f"{stage}_s"]
        self.ended = self.started + self.elapsed()
        if receipt["started_at"]:
            self.working = min(self.working, max(self.started, min(receipt["started_at"], self.ended)))
        if not self.receipts:
            self.received, self._early = self.ended, self.seconds.copy()
        self.receipts += 1

    def add_trouble(self, trouble: Mapping[str, int]) -> None:
        """Count the rows of a shard that a later run tries again."""
        for text, count in trouble.items():
            self.trouble[text if text in self.trouble or len(self.trouble) < HOSTS else OTHER_HOSTS] += count

    def add_commit(self) -> None:
        """Count a shard that is committed now."""
        self.shards += 1
        self.ended = self.started + self.elapsed()

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._began

    def rate(self) -> float:
        """Return the images per second from the first decoded image to the latest receipt or commit.

        It is the one throughput of a run, for its progress and for its manifest, so it is rounded here.
        """
        return round(self.rows / self._wall(), 2)

    def rejected_fraction(self) -> float:
        """Return the rejected part of this run's images, from 0 to 1. Images lost in broken archives count.

        Images that a later run tries again do not count as rejected.
        """
        rejected = self.rejected - self.trouble.total() + self.lost
        return rejected / max(1, self.rows + self.lost)

    def count(self) -> dict[str, Any]:
        """Return the counts of a run that was interrupted, for the manifest."""
        counts = {"shards": self.shards, "rows": self.rows, "rows_rejected": self.rejected}
        return {**counts, "images_per_second": self.rate()} if self.rows else counts

    def summarize(self, readers: int, decoders: int, writers: int) -> dict[str, Any]:
        """Return the report for the manifest.

        `readers`, `decoders` and `writers` are the numbers of workers that these stages could use. `busy` is the share
        of the time in which the workers of a stage worked, and did not wait for another stage. `limited_by` is the
        stage whose workers hardly waited, while all others did. It is None if there is no such stage, or if the run was
        too short to know. `queue` is waiting time, so it is never the limit.
        """
        busy = self._measure_busy(readers, decoders, writers)
        return {
            "shards": self.shards,
            "rows": self.rows,
            "rows_tagged": self.tagged,
            "rows_rejected": self.rejected,
            "images_lost": self.lost,
            "trouble": dict(self.trouble.most_common(TROUBLE_LISTED)),
            "startup_seconds": round(min(self.working, max(self.ended, self.started)) - self.started, 3),
            "seconds": round(self._wall(), 3),
            "stage_seconds": {stage: round(self.seconds[stage], 3) for stage in STAGES},
            "busy": {stage: round(share, 3) for stage, share in busy.items()},
            "limited_by": self._find_limit(busy),
            "images_per_second": self.rate(),
            "actors": sorted(self.actors),
        }

    def _wall(self) -> float:
        return max(self.ended - self.working, 1e-9)

    def _measure_busy(self, readers: int, decoders: int, writers: int) -> dict[str, float]:
        """Return the busy share of each stage, from 0 to 1, or a little more from rounding and late receipts.

        Readers and decoders may work from the first image on. The model and the sinks have nothing to do until the
        first block is full, and the model may still be loading, so their time begins with the first receipt.
        """
        if not self.rows:
            return dict.fromkeys(("read", "decode", "model", "write"), 0.0)
        later = max(self.ended - self.received, 1e-9)
        workers = {"read": readers, "decode": decoders, "model": len(self.actors), "write": writers}
        return {
            stage: (self.seconds[stage] / self._wall() if stage in ("read", "decode") else self._late(stage) / later)
            / max(1, count)
            for stage, count in workers.items()
        }

    def _late(self, stage: str) -> float:
        return self.seconds[stage] - self._early[stage]

    def _find_limit(self, busy: dict[str, float]) -> str | None:
        if self.ended - self.received < KNOWN_SECONDS or self.receipts < KNOWN_RECEIPTS:
            return None
        second, first = sorted(busy, key=lambda stage: busy[stage])[-2:]
        known = busy[first] >= LIMIT_BUSY and busy[first] - busy[second] >= LIMIT_LEAD
        return first if known else None
