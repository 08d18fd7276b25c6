"""Recomputing an output from its files: is every planned row there, once?"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.commit import list_committed, list_output_files, read_json
from pipelines.plan import ShardRef, list_shards
from pipelines.shards import FINGERPRINT_KEY, commit_uri
from storage.settings import ConfigError
from storage.store import NotFound, Store, StoreError, join

_THREADS = 4
_PROBLEMS_LISTED = 20


@dataclass
class Report:
    """What `verify` found. Everything but `shards` is counted in the files, not taken from a record.

    `duplicates` are rows that stand in the output more than once, `missing` rows that were read and are not there,
    or are expected of shards that are not committed. `orphans` are files that no commit names. `problems` says all of
    it in words, the first few.
    """

    ok: bool = False
    shards: int = 0
    rows_in: int = 0
    rows_tagged: int = 0
    rows_rejected: int = 0
    duplicates: int = 0
    missing: int = 0
    orphans: int = 0
    files: int = 0
    orphans_removed: int = 0
    problems: list[str] = field(default_factory=list)

    def note(self, problem: str) -> None:
        """Add a problem: it makes the output not ok."""
        if len(self.problems) < _PROBLEMS_LISTED:
            self.problems.append(problem)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class _Shard:
    """What one shard's files hold."""

    rows_in: int = 0
    tagged: int = 0
    rejected: int = 0
    duplicates: int = 0
    missing: int = 0
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify_output(store: Store, output: str, *, remove_orphans: bool = False) -> Report:
    """Read every file of an output and count. Each file's bytes are compared with the digest that was committed.

    Raises `ConfigError` when there is no output, `StoreError` when it cannot be read.
    """
    planned = list(list_shards(store, output))
    if not planned:
        raise ConfigError(f"{output}: there is no plan here, so this is no output of `sightline tag`")
    report = Report(shards=len(planned))
    fingerprint = store.read(join(output, "fingerprint.json"))
    committed = list_committed(store, output)
    done = [ref for ref in planned if ref.shard in committed]
    for ref in planned:
        if ref.shard not in committed:
            report.missing += max(1, ref.rows)
            report.note(f"shard {ref.shard} is not committed: run `sightline tag` again")
    for shard in sorted(committed - {ref.shard for ref in planned}):
        report.note(f"commit of {shard}, which is not in the plan")
    named: set[str] = set()
    for found in _check_all(store, output, done, fingerprint):
        report.rows_in += found.rows_in
        report.rows_tagged += found.tagged
        report.rows_rejected += found.rejected
        report.duplicates += found.duplicates
        report.missing += found.missing
        report.files += len(found.files)
        named.update(join(output, path) for path in found.files)
        for problem in found.problems:
            report.note(problem)
    for uri in list_output_files(store, output):
        if uri in named:
            continue
        if remove_orphans:
            store.delete(uri)
            report.orphans_removed += 1
        else:
            report.orphans += 1
            report.note(f"{uri} belongs to no commit: remove it with --remove-orphans when no run is under way")
    _check_manifest(store, output, report)
    if report.rows_tagged + report.rows_rejected != report.rows_in:
        report.note(f"{report.rows_in} rows in, {report.rows_tagged} tagged and {report.rows_rejected} rejected")
    report.ok = not report.problems and not report.missing and not report.duplicates
    return report


def _check_all(store: Store, output: str, refs: list[ShardRef], fingerprint: bytes) -> Iterator[_Shard]:
    """Every shard, a few at a time: no more than those are in memory."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(refs), 4 * _THREADS):
            group = refs[start : start + 4 * _THREADS]
            yield from pool.map(lambda ref: _check_shard(store, output, ref.shard, fingerprint), group)


def _check_shard(store: Store, output: str, shard: str, fingerprint: bytes) -> _Shard:
    found = _Shard()
    try:
        record = read_json(store, commit_uri(output, shard))
        found.rows_in = int(record["rows_in"])
        files = list(record["files"])
        if record["fingerprint"] != hashlib.sha256(fingerprint).hexdigest():
            found.problems.append(f"shard {shard} was committed under another fingerprint")
    except (StoreError, KeyError, TypeError, ValueError) as error:
        found.missing = 1
        found.problems.append(f"shard {shard}: its commit record is broken: {error}")
        return found
    rows = [np.zeros(0, np.int64)]
    for file in files:
        found.files.append(file["path"])
        numbers = _check_file(store, join(output, file["path"]), file, fingerprint, found)
        rows.append(numbers)
        if file["path"].startswith("data/"):
            found.tagged += len(numbers)
        else:
            found.rejected += len(numbers)
    distinct, counts = np.unique(np.concatenate(rows), return_counts=True)
    found.duplicates = int((counts - 1).sum())
    inside = int(((distinct >= 0) & (distinct < found.rows_in)).sum())
    found.missing = found.rows_in - inside
    if found.duplicates or found.missing or inside != len(distinct):
        found.problems.append(
            f"shard {shard}: of {found.rows_in} rows {found.missing} are missing, {found.duplicates} are doubled and "
            f"{len(distinct) - inside} were never read"
        )
    return found


def _check_file(store: Store, uri: str, file: dict[str, Any], fingerprint: bytes, found: _Shard) -> np.ndarray:
    """The row numbers in one file, after checking its bytes. Empty when it is not there or broken."""
    nothing = np.zeros(0, np.int64)
    try:
        data = store.read(uri)
    except NotFound:
        found.problems.append(f"{uri} is missing")
        return nothing
    if hashlib.sha256(data).hexdigest() != file["sha256"]:
        found.problems.append(f"{uri} is not the file that was committed: its SHA-256 differs")
    try:
        table = pq.read_table(io.BytesIO(data), columns=["row"])
        metadata = pq.read_metadata(io.BytesIO(data)).metadata or {}
    except (pa.ArrowException, OSError) as error:
        found.problems.append(f"{uri} cannot be read: {error}")
        return nothing
    if metadata.get(FINGERPRINT_KEY) != fingerprint:
        found.problems.append(f"{uri} carries another fingerprint")
    return np.asarray(table["row"].to_numpy())


def _check_manifest(store: Store, output: str, report: Report) -> None:
    """A finished output has a manifest, and it says what the files say."""
    uri = join(output, "manifest.json")
    if store.stat(uri) is None:
        report.note("there is no manifest.json: the last run did not finish; run `sightline tag` again")
        return
    try:
        manifest = json.loads(store.read(uri))
        said = {name: manifest[name] for name in ("shards", "rows_in", "rows_tagged", "rows_rejected")}
        files = len(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        report.note(f"manifest.json is broken: {error}")
        return
    counted = {name: getattr(report, name) for name in said}
    if said != counted or files != report.files:
        report.note(f"manifest.json says {said} in {files} files, and there are {counted} in {report.files}")
