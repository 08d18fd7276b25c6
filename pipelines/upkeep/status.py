"""The status of an output: what is planned, committed and waiting, and the latest runs. Reads a few small files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.output.ledger import list_ledgers
from pipelines.output.output import MANIFEST, Output
from pipelines.output.state import read_markers
from pipelines.output.totals import Totals, read_totals
from storage.settings import ConfigError
from storage.store import NotFound

EXAMPLES = 3
"""The number of details that are told of each reason for which something waits."""


@dataclass(frozen=True)
class Status:
    """The status of an output.

    `planned` and `committed` are shards: those that the last finished run planned, and all that are in a ledger.
    `waiting` counts by reason what that run could not read, with a few `examples`. `runs` are the latest runs, the last
    one first. `under_way` are the times, in UTC, at which runs that did not end were last seen: runs in progress, or
    runs that were killed. A run in progress tells of itself at its start, and each hour in which it commits.
    """

    planned: int
    committed: int
    rows_in: int
    rows_tagged: int
    rows_rejected: int
    reasons: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    under_way: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the status as a dictionary that JSON can hold."""
        return asdict(self)


def read_status(output: Output) -> Status:
    """Read the status of an output. Raises `ConfigError` if there is none, `StoreError`."""
    markers = sorted(about["updated_at"].isoformat() for about in read_markers(output))
    try:
        manifest = output.read_json(MANIFEST)
    except NotFound as error:
        if not markers and not output.segments():
            raise ConfigError(f"{output.uri} is no output of `sightline tag`: {error}") from None
        manifest = {}  # the first run is under way, or was killed
    totals = read_totals(output, list_ledgers(output)[manifest.get("ledgers", 0) :])
    # The manifest of an earlier version counts no ledgers. An upgrade that was killed may have written some.
    if "ledgers" in manifest or totals.shards < manifest.get("shards", 0):
        if "ledgers" not in manifest:
            totals = Totals()
        totals.merge({name: manifest.get(name, 0) for name in ("shards", "rows_in", "rows_tagged", "rows_rejected")})
        totals.reasons.update(manifest.get("reasons", {}))
    waiting: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    for item in manifest.get("waiting", []):
        waiting[item["reason"]] = waiting.get(item["reason"], 0) + item.get("shards", 1)
        if len(told := examples.setdefault(item["reason"], [])) < EXAMPLES:
            told.append(item["detail"])
    return Status(
        manifest.get("planned_shards", 0),
        totals.shards,
        totals.rows_in,
        totals.rows_tagged,
        totals.rows_rejected,
        {reason: count for reason, count in totals.reasons.most_common() if count},
        waiting,
        examples,
        manifest.get("runs", []),
        markers,
    )
