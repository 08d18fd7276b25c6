"""Verification of an output: reads all its files, and checks that every planned row is there exactly once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import chain, groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.output.ledger import Ledger
from pipelines.output.output import (
    FINGERPRINT,
    MANIFEST,
    MANIFEST_VERSION,
    Output,
    merged_at,
    owner_of,
    parse_shard,
    shard_id,
)
from pipelines.output.row_files import RowFile
from pipelines.output.state import OutputState
from pipelines.output.writer import FINGERPRINT_KEY
from pipelines.planning.plan import Plan, read_plan
from pipelines.tables.publication import Publication, compare_tables
from storage.files import download
from storage.schemes import is_remote
from storage.settings import ConfigError
from storage.store import NotFound, StoreError

_REMOTE_THREADS = 16
"""Files of an object store that are read at the same time, at least."""
_ROWS = 1_000_000
"""Rows of the shards that are checked together. Memory holds their row numbers."""
_PROBLEMS_LISTED = 20


@dataclass
class Report:
    """The result of a verification. Rows are counted in the data and reject files.

    `shards` counts planned shards, and `committed` those of them that are committed. `rows_in` is the number of rows
    that were read, from the commit records. `duplicates` are rows that are in the output more than once. `missing` are
    rows that were read and are not there, and the expected rows of shards that are not committed. `orphans` are files
    that no commit names. `problems` describes the first 20 problems in words, and tells how many more there are. A
    table of the output that is behind it is a problem too.
    """

    ok: bool = False
    shards: int = 0
    committed: int = 0
    rows_in: int = 0
    rows_tagged: int = 0
    rows_rejected: int = 0
    duplicates: int = 0
    missing: int = 0
    orphans: int = 0
    files: int = 0
    orphans_removed: int = 0
    problems: list[str] = field(default_factory=list)
    _count: int = 0

    def note(self, problem: str) -> None:
        """Add a problem. An output with a problem is not ok."""
        self._count += 1
        if self._count <= _PROBLEMS_LISTED:
            self.problems.append(problem)
        else:
            self.problems[_PROBLEMS_LISTED:] = [f"and {self._count - _PROBLEMS_LISTED:,} more problems"]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary that JSON can hold."""
        return {name: value for name, value in asdict(self).items() if name != "_count"}


def verify_output(output: Output, *, remove_orphans: bool = False, since: date | None = None) -> Report:
    """Read every file of an output and count its rows. Compare each file's SHA-256 with the one in the ledger.

    With `since`, only the files of shards that were sealed on that day or later are read (UTC). Of files that belong to
    no commit, only those that compactions have left are looked for: they have rows a second time. Raises `ConfigError`
    if there is no output, `StoreError` if the output cannot be read.
    """
    plan = read_plan(output, inputs=False)
    if not plan.segments:
        raise ConfigError(f"{output.uri}: there is no plan here, so this is no output of `sightline tag`")
    ledger = Ledger.read(output)
    report = Report(shards=plan.shards)
    # At once: until all files are read, a run may have brought the tables up to further ledgers than these.
    _check_tables(output, ledger, report)
    fingerprint = output.read(FINGERPRINT)
    unsealed = _find_unsealed(output, plan, ledger, report, quickly=since is not None)
    _compare_plan(plan, ledger, unsealed, report)
    first = 0
    if since is not None:  # not all ledgers before: a clock may have been wrong
        first = next((n for n, time in enumerate(ledger.times) if time >= since.isoformat()), ledger.count)
    named: set[str] = set()
    for files in _list_shards(output, ledger, unsealed, first):
        _check_shards(output, files, fingerprint, report)
        named.update(file.path for _, file in files)
    unread = sum("commit record" in problem for problem in report.problems)
    if since is None:
        manifest = _check_manifest(output, ledger, report, unsealed)
        # A table that is behind the ledgers may name files that these name no more. It is looked at once more, because
        # what is deleted cannot be had again.
        behind = remove_orphans and not Publication().is_current(OutputState(output, plan, ledger))
        _check_orphans(
            output, report, named, remove=remove_orphans, unsure=_doubt(manifest, unread, behind, output.uri)
        )
    else:
        for path in OutputState(output, plan, ledger).find_abandoned():
            report.orphans += 1
            report.note(f"{path} belongs to no commit, a compaction was interrupted: `sightline compact` removes it")
    if report.rows_tagged + report.rows_rejected != report.rows_in:
        report.note(f"{report.rows_in} rows in, {report.rows_tagged} tagged and {report.rows_rejected} rejected")
    report.ok = not report.problems and not report.missing and not report.duplicates
    return report


def _check_tables(output: Output, ledger: Ledger, report: Report) -> None:
    """Note which tables of the output are not at the state of the ledgers, by their own notes."""
    try:
        found = compare_tables(output, ledger)
    except StoreError as error:
        report.note(str(error))
        return
    for name, why in found.items():
        if why:
            report.note(f"the table {name}: {why}")


def _find_unsealed(
    output: Output, plan: Plan, ledger: Ledger, report: Report, *, quickly: bool
) -> list[dict[str, Any]]:
    """Return the commit records that no ledger has, of the latest generation of each shard.

    Notes sealed shards whose record is gone, unless it is to be done `quickly`: then only the segments are listed that
    have a shard that is not sealed.
    """
    sealed = {segment.number: ledger.generations(segment.number, len(segment)) for segment in plan.segments}
    gone = {number: np.array(generations >= 0) for number, generations in sealed.items()}
    found: dict[str, int] = {}
    segments = {number for number, generations in sealed.items() if (generations < 0).any() or not quickly}
    for shard, generation in output.list_commits(segments):
        segment, number = parse_shard(shard)
        if generation > max(found.get(shard, -1), ledger.generation_of(shard)):
            found[shard] = generation
        elif number < len(gone[segment]) and generation == sealed[segment][number]:
            gone[segment][number] = False
    for segment, numbers in gone.items() if not quickly else ():
        for number in np.flatnonzero(numbers).tolist():
            report.note(f"the commit record of shard {shard_id(segment, number)} is gone")
    records = []
    for shard, generation in sorted(found.items()):
        try:
            records.append(output.read_commit(shard, generation))
        except StoreError as error:
            report.missing += 1
            report.note(f"commit record of shard {shard}: {error}")
    return records


def _compare_plan(plan: Plan, ledger: Ledger, unsealed: list[dict[str, Any]], report: Report) -> None:
    """Compare the plan with what is committed."""
    committed = {record["shard"] for record in unsealed}
    for segment in plan.segments:
        sealed = ledger.generations(segment.number, len(segment)) >= 0
        report.committed += int(sealed.sum())
        for index in np.flatnonzero(~sealed).tolist():
            if (shard := shard_id(segment.number, index)) in committed:
                report.committed += 1
                continue
            report.missing += max(1, int(segment.images[index]))
            report.note(f"shard {shard} is not committed: run `sightline tag` again")
    if unknown := ledger.totals.shards - sum(
        int((ledger.generations(segment.number, len(segment)) >= 0).sum()) for segment in plan.segments
    ):
        report.note(f"{unknown} shards are committed and not in the plan")


def _list_shards(
    output: Output, ledger: Ledger, unsealed: list[dict[str, Any]], first: int
) -> Iterator[list[tuple[str, RowFile]]]:
    """Yield the files of some shards with about `_ROWS` rows, each with the name of the shard."""
    again = {record["shard"] for record in unsealed}
    group: list[tuple[str, RowFile]] = []
    rows = 0
    sealed = ((shard, file) for shard, file in ledger.list_files(first=first) if shard not in again)
    others = ((record["shard"], file) for record in unsealed for file in ledger.files_of(record))
    for _, files in groupby(chain(sealed, others), key=lambda pair: pair[0]):
        new = list(files)
        group += new
        rows += sum(file.rows for _, file in new)
        if rows >= _ROWS:
            yield group
            group, rows = [], 0
    if group:
        yield group


def _check_shards(output: Output, files: list[tuple[str, RowFile]], fingerprint: bytes, report: Report) -> None:
    """Check some shards by all their files, each of which is read once."""
    parts: dict[str, list[tuple[str, RowFile]]] = {}
    for shard, file in files:
        parts.setdefault(file.path, []).append((shard, file))
    found: dict[str, list[NDArray[np.int64]]] = {shard: [] for shard, _ in files}
    expected = dict.fromkeys(found, 0)
    for shard, file in files:
        expected[shard] += file.rows
    threads = max(_REMOTE_THREADS if is_remote(output.uri) else 0, 2 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(threads) as pool:
        for numbers, problems in pool.map(lambda slices: _check_file(output, slices, fingerprint), parts.values()):
            for problem in problems:
                report.note(problem)
            for shard, kind, rows in numbers:
                found[shard].append(rows)
                if kind == "data":
                    report.rows_tagged += len(rows)
                else:
                    report.rows_rejected += len(rows)
    report.files += len(parts)
    for shard, rows_in in expected.items():
        report.rows_in += rows_in
        distinct, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *found[shard]]), return_counts=True)
        doubled = int((counts - 1).sum())
        inside = int(((distinct >= 0) & (distinct < rows_in)).sum())
        report.duplicates += doubled
        report.missing += rows_in - inside
        if doubled or inside < rows_in or inside != len(distinct):
            report.note(
                f"shard {shard}: of {rows_in} rows {rows_in - inside} are missing, {doubled} are doubled and "
                f"{len(distinct) - inside} were never read"
            )


def _doubt(manifest: bool, unread: int, behind: bool, uri: str) -> str:
    """Return why it is unsafe to delete files that no commit names, or an empty string if it is safe."""
    if unread:
        return f"{unread} commit records cannot be read"
    if behind:
        return f"its table may name them: run `sightline publish {uri}`"
    return "" if manifest else "manifest.json cannot be read, or says something else"


def _check_orphans(output: Output, report: Report, named: set[str], *, remove: bool, unsure: str) -> None:
    """Count or delete the files that no commit names. Only files with names that Sightline writes are deleted."""
    for path in output.files():
        if path in named:
            continue
        if owner_of(path) is None and merged_at(path) is None:
            # Readers of Parquet folders skip names that begin with a dot or an underscore.
            if path.endswith(".parquet") and not path.rpartition("/")[2].startswith((".", "_")):
                report.note(
                    f"{output.uri_of(path)} was written by no run: move it elsewhere, because readers of the folder "
                    "read it too"
                )
            continue
        if remove and not unsure:
            output.delete(path)
            report.orphans_removed += 1
        else:
            report.orphans += 1
            why = f"nothing is removed, because {unsure}" if remove else "remove it with --remove-orphans"
            report.note(
                f"{output.uri_of(path)} belongs to no commit: {why if remove else why + ' when no run is under way'}"
            )


def _check_file(
    output: Output, slices: list[tuple[str, RowFile]], fingerprint: bytes
) -> tuple[list[tuple[str, str, NDArray[np.int64]]], list[str]]:
    """Check one file's bytes. Return the row numbers of each shard in it, none if it is missing, and the problems."""
    file = slices[0][1]
    uri = output.uri_of(file.path)
    problems: list[str] = []
    try:
        with download(output.store, uri) as stored:
            if stored.sha256 != file.sha256:
                problems.append(f"{uri} is not the file that was committed: its SHA-256 differs")
            with pq.ParquetFile(stored.file) as parquet:
                numbers = parquet.read(columns=["row"])["row"].to_numpy()
                metadata = parquet.metadata.metadata or {}
    except NotFound:
        return [], [f"{uri} is missing: restore it, or tag its inputs into another output"]
    except (pa.ArrowException, OSError) as error:
        return [], [f"{uri} cannot be read: {error}"]
    if metadata.get(FINGERPRINT_KEY) != fingerprint:
        problems.append(f"{uri} carries another fingerprint")
    if merged_at(file.path) is None and len(numbers) != file.rows:
        problems.append(f"{uri} has {len(numbers)} rows, and {file.rows} were committed")
        return [(slices[0][0], file.kind, np.asarray(numbers))], problems
    rows = [(shard, one.kind, np.asarray(numbers[one.first : one.first + one.rows])) for shard, one in slices]
    return rows, problems


def _check_manifest(output: Output, ledger: Ledger, report: Report, unsealed: list[dict[str, Any]]) -> bool:
    """Compare the manifest with the ledgers. Return False if it is broken, or says something else."""
    if not output.exists(MANIFEST):
        report.note("there is no manifest.json: the last run did not finish; run `sightline tag` again")
        return True
    try:
        manifest = json.loads(output.read(MANIFEST))
        if manifest.get("schema_version", 0) < MANIFEST_VERSION:
            report.note(f"manifest.json is of an earlier version: run `sightline upgrade {output.uri}`")
            return bool(unsealed)
        said = {name: manifest[name] for name in ("ledgers", "shards", "rows_in", "rows_tagged", "rows_rejected")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        report.note(f"manifest.json is broken: {error}")
        return False
    counted = {name: getattr(ledger.totals, name) for name in said if name != "ledgers"} | {"ledgers": ledger.count}
    if said != counted:
        report.note(f"manifest.json says {said}, and the ledgers say {counted}: run `sightline tag` again")
    if unsealed:
        report.note(f"{len(unsealed)} shards are committed and in no ledger: run `sightline tag` again")
    rows = {name: getattr(report, name) for name in ("rows_in", "rows_tagged", "rows_rejected")}
    for record in unsealed:
        for name in rows:
            rows[name] -= record[name]
    if not unsealed and any(rows[name] != getattr(ledger.totals, name) for name in rows):
        report.note(f"the ledgers' totals are {ledger.totals.rows_in} rows, and {report.rows_in} are in the files")
    return said == counted or bool(unsealed) or said["ledgers"] < ledger.count
