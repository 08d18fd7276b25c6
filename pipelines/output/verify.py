"""Recomputing an output from its files: is every planned row there, once?"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.inputs.plan import list_shards
from pipelines.output.commit import FINGERPRINT_KEY
from pipelines.output.layout import list_commits, list_output_files, owner_of, read_commit
from storage.settings import ConfigError
from storage.store import NotFound, Store, StoreError, join

_THREADS = 4
_PROBLEMS_LISTED = 20


@dataclass
class Report:
    """What `verify` found. Everything but `shards` and `committed`, of them, is counted in the files, not taken from a
    record.

    `duplicates` are rows that stand in the output more than once, `missing` rows that were read and are not there,
    or are expected of shards that are not committed. `orphans` are files that no commit names. `problems` says all of
    it in words, the first few.
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

    def note(self, problem: str) -> None:
        """Add a problem: it makes the output not ok."""
        if len(self.problems) < _PROBLEMS_LISTED:
            self.problems.append(problem)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class _Shard:
    """What one shard's files hold. `read` is false when its commit record cannot be read."""

    read: bool = True
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
    commits = list_commits(store, output)
    report.committed = len(commits)
    for ref in planned:
        if ref.shard not in commits:
            report.missing += max(1, ref.rows)
            report.note(f"shard {ref.shard} is not committed: run `sightline tag` again")
    for shard in sorted(commits.keys() - {ref.shard for ref in planned}):
        report.note(f"commit of {shard}, which is not in the plan")
    named: set[str] = set()
    unread = 0
    for found in _check_all(store, output, commits, fingerprint):
        report.rows_in += found.rows_in
        report.rows_tagged += found.tagged
        report.rows_rejected += found.rejected
        report.duplicates += found.duplicates
        report.missing += found.missing
        report.files += len(found.files)
        unread += not found.read
        named.update(join(output, path) for path in found.files)
        for problem in found.problems:
            report.note(problem)
    manifest = _check_manifest(store, output, report)
    _check_orphans(store, output, report, named, manifest, unread=unread, remove=remove_orphans)
    if report.rows_tagged + report.rows_rejected != report.rows_in:
        report.note(f"{report.rows_in} rows in, {report.rows_tagged} tagged and {report.rows_rejected} rejected")
    report.ok = not report.problems and not report.missing and not report.duplicates
    return report


def _check_orphans(
    store: Store,
    output: str,
    report: Report,
    named: set[str],
    manifest: set[str] | None,
    *,
    unread: int,
    remove: bool,
) -> None:
    """Files that no commit names. They are removed, if asked, only when it is certain that they are nobody's.

    Not while a commit record cannot be read, or is gone although the manifest names its files. Only files with names
    that a run gives. `manifest` is None when there is one that cannot be read.
    """
    unsure = ""
    if unread:
        unsure = f"{unread} commit records cannot be read"
    elif manifest is None:
        unsure = "manifest.json cannot be read"
    elif manifest - named:
        unsure = f"manifest.json names {len(manifest - named)} files that no commit names"
    for uri in list_output_files(store, output):
        if uri in named:
            continue
        if owner_of(output, uri) is None:
            # Readers of the folder skip names that begin with a dot or an underscore.
            if uri.endswith(".parquet") and not uri.rpartition("/")[2].startswith((".", "_")):
                report.note(f"{uri} was written by no run: move it elsewhere, who reads the folder reads it too")
            continue
        if remove and not unsure:
            store.delete(uri)
            report.orphans_removed += 1
        else:
            report.orphans += 1
            why = f"nothing is removed, because {unsure}" if remove else "remove it with --remove-orphans"
            report.note(f"{uri} belongs to no commit: {why if remove else why + ' when no run is under way'}")


def _check_all(store: Store, output: str, commits: Mapping[str, int], fingerprint: bytes) -> Iterator[_Shard]:
    """Every committed shard, a few at a time: no more than those are in memory."""
    shards = sorted(commits)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(shards), 4 * _THREADS):
            group = shards[start : start + 4 * _THREADS]
            yield from pool.map(lambda shard: _check_shard(store, output, shard, commits[shard], fingerprint), group)


def _check_shard(store: Store, output: str, shard: str, generation: int, fingerprint: bytes) -> _Shard:
    found = _Shard()
    try:
        record = read_commit(store, output, shard, generation)
    except StoreError as error:
        found.read = False
        found.missing = 1
        found.problems.append(f"shard {shard}: {error}")
        return found
    found.rows_in = record["rows_in"]
    files = record["files"]
    if record.get("fingerprint") != hashlib.sha256(fingerprint).hexdigest():
        found.problems.append(f"shard {shard} was committed under another fingerprint")
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
    if hashlib.sha256(data).hexdigest() != file.get("sha256"):
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


def _check_manifest(store: Store, output: str, report: Report) -> set[str] | None:
    """A finished output has a manifest that says what the files say. The files it names; None if it is broken."""
    uri = join(output, "manifest.json")
    if store.stat(uri) is None:
        report.note("there is no manifest.json: the last run did not finish; run `sightline tag` again")
        return set()
    try:
        manifest = json.loads(store.read(uri))
        said = {name: manifest[name] for name in ("shards", "rows_in", "rows_tagged", "rows_rejected")}
        files = {join(output, file["path"]) for file in manifest["files"]}
    except (ValueError, KeyError, TypeError) as error:
        report.note(f"manifest.json is broken: {error}")
        return None
    counted = {name: getattr(report, name) for name in said} | {"shards": report.committed}
    if said != counted or len(files) != report.files:
        report.note(f"manifest.json says {said} in {len(files)} files, and there are {counted} in {report.files}")
    return files
