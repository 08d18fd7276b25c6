"""Totals: the counts of an output's shards, which its ledgers add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Totals:
    """Counts over shards: `shards`, the sum of their `generations`, rows, and rows by reason and by best label.

    `skipped` counts members of tars that are no images.
    """

    shards: int = 0
    generations: int = 0
    rows_in: int = 0
    rows_tagged: int = 0
    rows_rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, record: Mapping[str, Any], sign: int = 1) -> None:
        """Add a commit record, or subtract it if `sign` is -1."""
        self.shards += sign
        self.generations += sign * record.get("generation", 0)
        for name in ("rows_in", "rows_tagged", "rows_rejected"):
            setattr(self, name, getattr(self, name) + sign * record[name])
        for name in ("reasons", "labels", "skipped"):
            counter = getattr(self, name)
            for key, count in record.get(name, {}).items():
                counter[key] += sign * count

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add the totals of a ledger."""
        for name, value in other.items():
            mine = getattr(self, name)
            if isinstance(mine, Counter):
                for key, count in value.items():
                    mine[key] += count
            else:
                setattr(self, name, mine + value)

    def as_dict(self) -> dict[str, Any]:
        """Return the totals as a dictionary that JSON can hold, without counts of 0."""
        return {
            name: {key: count for key, count in value.items() if count} if isinstance(value, dict) else value
            for name, value in vars(self).items()
        }
