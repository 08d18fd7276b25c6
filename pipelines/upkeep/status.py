"""The status of an output: what is planned, committed and waiting, the latest runs, and its tables.

Reads a few small files, and if the output has a table, all ledgers: 0.2 s for a million files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.output.ledger import Ledger, list_ledgers
from pipelines.output.markers import Marker, read_markers
from pipelines.output.output import MANIFEST, TABLES, Output
from pipelines.output.state import OutputState
from pipelines.output.totals import Totals, read_totals
from pipelines.planning.plan import read_plan
from pipelines.tables.publication import compare_tables
from storage.settings import ConfigError
from storage.store import NotFound

EXAMPLES = 3
"""The number of details that are told of each reason for which something waits."""


@dataclass(frozen=True)
class Status:
    """The status of an output.

    `planned` and `committed` are shards. `waiting` counts by reason what the last finished run could not read, with a
    few `examples`. `runs` are the latest runs, the last one first, also those that were interrupted.

    `under_way` are the times, in UTC, at which the runs and compactions began that are at work. On another machine they
    may have been killed: that is known after two days of silence. `killed` are the times at which those began that are
    known to have ended without a word. The next run takes up their work.

    `tables` are the tables of the output, as configurations name them, each with why it is not at the state of what
    is committed, or "" if it is.
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
    killed: list[str] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the status as a dictionary that JSON can hold."""
        return asdict(self)


def read_status(output: Output) -> Status:
    """Read the status of an output. Raises `ConfigError` if there is none, `StoreError`."""
    markers = sorted(read_markers(output), key=lambda marker: marker.started_at)
    try:
        manifest = output.read_json(MANIFEST)
    except NotFound as error:
        if not markers and not output.segments():
            raise ConfigError(f"{output.uri} is no output of `sightline tag`: {error}") from None
        manifest = {}  # the first run is under way, or was interrupted
    totals = read_totals(output, list_ledgers(output)[manifest.get("ledgers", 0) :])
    # The manifest of an earlier version counts no ledgers. An upgrade that was killed may have written some.
    if "ledgers" in manifest or totals.shards < manifest.get("shards", 0):
        if "ledgers" not in manifest:
            totals = Totals()
        totals.merge({name: manifest.get(name, 0) for name in ("shards", "rows_in", "rows_tagged", "rows_rejected")})
        totals.reasons.update(manifest.get("reasons", {}))
    planned = manifest.get("planned_shards", 0)
    if markers or not manifest:
        planned = _add_unsealed(output, totals, planned if "retagged_from" in manifest.get("run", {}) else None)
    waiting: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    for item in manifest.get("waiting", []):
        waiting[item["reason"]] = waiting.get(item["reason"], 0) + item.get("shards", 1)
        if len(told := examples.setdefault(item["reason"], [])) < EXAMPLES:
            told.append(item["detail"])
    return Status(
        planned,
        totals.shards,
        totals.rows_in,
        totals.rows_tagged,
        totals.rows_rejected,
        {reason: count for reason, count in totals.reasons.most_common() if count},
        waiting,
        examples,
        [*_list_ended(markers), *manifest.get("runs", [])],
        [_format_time(marker) for marker in markers if not marker.is_over()],
        [_format_time(marker) for marker in markers if marker.is_over() and marker.ended is None],
        compare_tables(output, Ledger.read(output)) if output.exists(TABLES) else {},
    )


def _add_unsealed(output: Output, totals: Totals, planned: int | None) -> int:
    """Add the shards that a run has committed since it sealed the last ones. Returns the number of planned shards.

    This reads the plan, and the commit records of up to 10,000 shards.
    """
    plan = read_plan(output, inputs=False)
    state = OutputState(output, plan, Ledger.read(output))
    for record in output.read_commits(sorted(state.find_unsealed().items())):
        state.ledger.add(record)
    totals.merge(vars(state.ledger.added))
    return plan.shards if planned is None else planned


def _list_ended(markers: list[Marker]) -> list[dict[str, Any]]:
    """Return what interrupted runs tell of themselves, the last one first."""
    return [marker.ended for marker in reversed(markers) if marker.ended and marker.ended.get("rows")]


def _format_time(marker: Marker) -> str:
    return marker.started_at.isoformat(timespec="seconds")
