"""The state of an output as a run finds it and changes it: the plan, what is committed, and the runs under way."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipelines.inputs.rows import fold_suffixes
from pipelines.output.ledger import Ledger
from pipelines.output.markers import Kind, Marker, make_marker, marker_path, read_markers
from pipelines.output.output import MANIFEST, MANIFEST_VERSION, TABLES, Output, merged_at, owner_of, parse_shard
from pipelines.planning.plan import Plan, ShardRef, count_shards
from storage.schemes import is_remote
from storage.store import Forbidden, StoreError, Unreachable

SEAL_SHARDS = 10_000
"""Committed shards that are sealed at once, if the run does not end before. A killed run leaves at most so many records
that the next run reads one by one."""
SEAL_SECONDS = 3600
"""The time after which fewer shards are sealed too, so that `status` knows of them, and the run's marker stays new."""
_TOP_LABELS = 100
"""Labels that the manifest counts."""
_RUNS = 30
"""Runs that the manifest remembers."""
_REMEMBERED = (
    "started_at",
    "hours",
    "shards",
    "rows",
    "rows_rejected",
    "images_per_second",
    "limited_by",
    "cost",
    "stopped",
)
"""What the manifest remembers of a run."""
_CLEANED_TOGETHER = 8
"""Segments whose files are held in memory at once to find leftovers."""
_ABANDONED = timedelta(days=1)
"""A merged file of this age that no ledger names is of a compaction that was killed, wherever that was."""


@dataclass
class OutputState:
    """An output with its plan and its ledger. All committed shards that were found are sealed.

    A run announces itself by a marker (`pipelines.output.markers`) with the segments that it works on. The marker of a
    run that was killed tells later runs where it may have left commits that are not sealed, and files that belong to no
    commit.
    """

    output: Output
    plan: Plan
    ledger: Ledger
    kind: Kind = "run"
    publish: Callable[[OutputState], bool] | None = None
    """Brings the tables of the output to the state of the ledgers, and tells whether they are there now. While they are
    not, no file is deleted, because tables name it: `pipelines.tables.publication`."""
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    _marker: Marker | None = None
    _over: list[Marker] = field(default_factory=list)
    _touched: set[int] = field(default_factory=set)
    _announced: set[int] = field(default_factory=set)
    _published: int = -1
    _sealed: float = field(default_factory=time.monotonic)

    def catch_up(self) -> None:
        """Seal the shards that earlier runs committed and did not seal. Raises `StoreError`."""
        for record in self.output.read_commits(sorted(self.find_unsealed().items())):
            self.add(record)
        self.ledger.seal()

    def find_unsealed(self) -> dict[str, int]:
        """Return the committed shards that no ledger has, or in an earlier generation, with their generations."""
        for marker in read_markers(self.output):
            self._touched.update(marker.segments)
        open_segments = {
            segment.number
            for segment in self.plan.segments
            if (self.ledger.generations(segment.number, len(segment)) < 0).any()
        }
        # A segment without a sealed shard may be all new. Then its listing is short.
        found: dict[str, int] = {}
        for shard, generation in self.output.list_commits(open_segments | self._touched):
            if generation > max(found.get(shard, -1), self.ledger.generation_of(shard)):
                found[shard] = generation
        return found

    def count_pending(self) -> tuple[int, int]:
        """The number of planned shards that are not committed, and of their expected images."""
        shards = images = 0
        for segment in self.plan.segments:
            open_ = self.ledger.generations(segment.number, len(segment)) < 0
            shards, images = shards + int(open_.sum()), images + int(segment.images[open_].sum())
        return shards, images

    def list_pending(self, *, newest_first: bool = False) -> Iterator[ShardRef]:
        """Yield the planned shards that are not committed, in the order of the plan, or in the opposite order."""
        step = -1 if newest_first else 1
        for segment in self.plan.segments[::step]:
            open_ = np.flatnonzero(self.ledger.generations(segment.number, len(segment)) < 0)
            for index in open_[::step].tolist():
                yield segment.ref(index)

    def announce(self, segments: Iterable[int]) -> None:
        """Write this run's marker: from now on it works on these segments."""
        self._announced.update(segments)
        self._touched.update(self._announced)
        self._marker = (self._marker or make_marker(self.run, self.kind)).renew(sorted(self._announced))
        self._marker.write(self.output)

    def leave(self, run: dict[str, Any]) -> None:
        """Tell in this run's marker that it was interrupted. `run` is its report, for the manifest of the next run."""
        if self._marker is not None:
            told = {name: run[name] for name in _REMEMBERED if name in run}
            self._marker.renew(sorted(self._announced), told).write(self.output)

    def find_others(self) -> list[Marker]:
        """Return the markers of other runs and compactions that may be at work now."""
        return [one for one in read_markers(self.output) if one.id != self.run and not one.is_over()]

    def add(self, record: dict[str, Any]) -> None:
        """Take up the record of a shard that is committed now. Seals what was added, when there is enough."""
        self._touched.add(parse_shard(record["shard"])[0])
        self.ledger.add(record)
        if self.ledger.waiting >= SEAL_SHARDS or time.monotonic() - self._sealed >= SEAL_SECONDS:
            self.ledger.seal()
            self._sealed = time.monotonic()
            if self._announced:
                self.announce(())

    def finish(
        self,
        fingerprint: dict[str, Any],
        run: dict[str, Any],
        waiting: list[dict[str, Any]],
        planned: int | None = None,
    ) -> dict[str, Any]:
        """Seal what was added, delete leftover files, write `manifest.json` and return it.

        `run` is the report of this run, `waiting` the shards and inputs that could not be read now. `planned` is the
        number of shards that the output is to have, by default that of the plan. Raises `StoreError`
        when a ledger or a commit record is damaged; then nothing is deleted. Nor is it if the output has tables that
        could not be brought up to it: the next run does that and deletes the files.
        """
        self.ledger.seal()
        self.ledger.refresh()
        self._published = -1
        published = self.bring_up()
        markers = [one for one in read_markers(self.output) if one.id != self.run]
        self._over = [one for one in markers if one.is_over() and set(one.segments) <= self._touched]
        if published and any(one.kind == "compaction" for one in self._over):
            self.delete_abandoned()
        kept = self._list_led_to()
        if published := published and self.bring_up():
            self._delete_leftovers(kept)
        count = -1
        while count < self.ledger.count:  # other runs may write ledgers, and end before this one
            published = published and self.bring_up()
            count = self.ledger.count
            shards = count_shards(self.output, self.plan) if planned is None else planned
            manifest = self._make_manifest(fingerprint, run, waiting, shards)
            manifest["runs"] = self._remember(run)
            content = json.dumps(manifest, ensure_ascii=False, indent=1).encode()
            self.output.store.put(self.output.uri_of(MANIFEST), content)
            self.ledger.refresh()
        if not published:
            if self._marker is not None:  # as after a compaction, there may be merged files that no ledger names
                self._marker = replace(self._marker, kind="compaction")
            self.leave(run)
            return manifest
        if kept:  # until now, the manifest before led to them
            self._delete_leftovers(frozenset())
        self._delete_replaced()
        self._delete_markers()
        return manifest

    def renew(self, fingerprint: dict[str, Any]) -> dict[str, Any]:
        """Do what `finish` does without a run: what the manifest says of the last run and of what waits stays."""
        manifest = self.read_manifest()
        run = manifest.get("run", {})
        # A retagged output has the whole plan of its source, and may have only the shards that were finished there.
        planned = manifest.get("planned_shards") if "retagged_from" in run else None
        return self.finish(fingerprint, run, manifest.get("waiting", []), planned)

    def is_current(self, manifest: dict[str, Any]) -> bool:
        """Tell whether a manifest describes this state."""
        counts = manifest.get("ledgers"), manifest.get("planned_shards")
        return counts == (self.ledger.count, self.plan.shards) and not self._touched

    def bring_up(self) -> bool:
        """Bring the tables of the output to the state of `ledger`, if that has changed since the last call.

        Returns whether they are at that state. If not, they name files of before, and none may be deleted: ledgers
        that other runs write may be read at any time, so this is to be called before each deletion.
        """
        if self._published != self.ledger.count:
            done = self.publish(self) if self.publish else not self.output.exists(TABLES)
            self._published = self.ledger.count if done else -1
        return self._published == self.ledger.count

    def _make_manifest(
        self, fingerprint: dict[str, Any], run: dict[str, Any], waiting: list[dict[str, Any]], planned: int
    ) -> dict[str, Any]:
        totals = self.ledger.totals
        return {
            "schema_version": MANIFEST_VERSION,
            "fingerprint": fingerprint,
            "planned_shards": planned,
            "shards": totals.shards,
            "generations": totals.generations,
            "ledgers": self.ledger.count,
            "rows_in": totals.rows_in,
            "rows_tagged": totals.rows_tagged,
            "rows_rejected": totals.rows_rejected,
            "reasons": {name: count for name, count in totals.reasons.most_common() if count},
            "skipped_members": fold_suffixes(totals.skipped),
            "top_labels": {name: count for name, count in totals.labels.most_common(_TOP_LABELS) if count},
            "waiting": waiting,
            "run": run,
        }

    def _remember(self, run: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what the manifest tells of the latest runs, the last one first."""
        earlier = self.read_manifest().get("runs", [])
        told = {name: run[name] for name in _REMEMBERED if name in run}
        left = [one.ended for one in self._over if one.ended and one.ended.get("rows")]
        runs = [*([told] if told.get("rows") else []), *left, *earlier]
        # The last run is told again when nothing was new. Another one may have begun in the same second.
        return [*{json.dumps(one, sort_keys=True): one for one in runs}.values()][:_RUNS]

    def read_manifest(self) -> dict[str, Any]:
        """Return the manifest, or an empty one if there is none or if it is damaged: it is written anew."""
        try:
            return self.output.read_json(MANIFEST)
        except (Forbidden, Unreachable):
            raise
        except StoreError:
            return {}

    def _list_led_to(self) -> Collection[str]:
        """Return the files of the segments touched that the manifest leads to, if ledgers have replaced rows since."""
        count = self.read_manifest().get("ledgers", 0)
        if not count or self.ledger.replacing < count:
            return frozenset()
        before = Ledger.read(self.output, count)
        return self._name_files(self._touched, before)

    def _delete_leftovers(self, kept: Collection[str]) -> None:
        """Delete the files that were written for a sealed shard and that no ledger names, of the segments touched.

        No later commit can name them, because each generation is committed once. All other files may belong to a run
        in progress and are kept.
        """
        touched = sorted(self._touched)
        for start in range(0, len(touched), _CLEANED_TOGETHER):
            segments = set(touched[start : start + _CLEANED_TOGETHER])
            named = self._name_files(segments, self.ledger)
            for kind in ("data", "rejects"):
                for name in self.output.list_names(kind, segments):
                    path = f"{kind}/{name}"
                    if path not in named and path not in kept and self._is_sealed(path):
                        self.output.delete(path)
        parts = [self.output.path_of(entry.uri) for entry in self.output.store.list(self.output.uri_of("parts"))]
        # A run announces itself before it writes its first part. Without another one, killed runs have left them.
        alone = bool(parts) and not self.find_others()
        for path in parts:
            if self._is_sealed(path) or (alone and owner_of(path) is not None):
                self.output.delete(path)

    def _delete_replaced(self) -> None:
        """Delete the merged files in which this run has replaced rows, if no shard has rows there any more.

        Files of one shard are among the leftovers.
        """
        if merged := {path for path in self.ledger.replaced if merged_at(path)}:
            for table in self.ledger.read_tables():
                merged.difference_update(pc.unique(table["path"]).to_pylist())
            for path in sorted(merged):
                self.output.delete(path)

    def _is_sealed(self, path: str) -> bool:
        owner = owner_of(path)
        return owner is not None and owner[1] <= self.ledger.generation_of(owner[0])

    def _name_files(self, segments: Collection[int], ledger: Ledger) -> set[str]:
        named: set[str] = set()
        for table in ledger.read_tables(segments=segments):
            named.update(table["path"].to_pylist())
        return named

    def retire(self) -> None:
        """Delete this run's marker, without what `finish` does."""
        self.output.delete(marker_path(self.run))

    def _delete_markers(self) -> None:
        """Delete this run's marker, and those of runs that are over, whose leftovers are deleted by now."""
        for id_ in (self.run, *(one.id for one in self._over)):
            self.output.delete(marker_path(id_))

    def delete_abandoned(self) -> None:
        """Delete merged files that no ledger names, of compactions that were killed."""
        found = self.find_abandoned()
        for path in found if found and self.bring_up() else ():
            self.output.delete(path)

    def find_abandoned(self) -> list[str]:
        """Return the merged files that no ledger names, of compactions that are over."""
        found: dict[str, datetime] = {}
        for kind in ("data", "rejects"):
            # A disk may have temporary files, whose names begin with a dot.
            for start in ("merged-",) if is_remote(self.output.uri) else ("merged-", ".merged-"):
                for name in self.output.store.names(self.output.uri_of(kind), start):
                    if time := merged_at(f"{kind}/{name}"):
                        found[f"{kind}/{name}"] = time
        if not found:
            return []
        # A compaction has announced itself before it writes its first file, and these were listed before its marker.
        if any(one.kind == "compaction" for one in self.find_others()):
            found = {path: time for path, time in found.items() if datetime.now(UTC) - time > _ABANDONED}
        self.ledger.refresh()
        named = {file.path for _, file in self.ledger.list_files()} if found else set()
        return [path for path in found if path not in named]


def read_state(output: Output, plan: Plan, publish: Callable[[OutputState], bool] | None = None) -> OutputState:
    """Read an output's ledgers, and seal what earlier runs committed and did not seal."""
    state = OutputState(output, plan, Ledger.read(output), publish=publish)
    state.catch_up()
    return state
