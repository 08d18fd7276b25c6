"""Verification of an output: reads all its files, and checks that every planned row is there exactly once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output.output import FINGERPRINT, MANIFEST, Output, owner_of
from pipelines.output.writer import FINGERPRINT_KEY
from pipelines.planning.plan import list_shards
from storage.files import download
from storage.settings import ConfigError
from storage.store import NotFound, StoreError

_THREADS = 4
_PROBLEMS_LISTED = 20


@dataclass
class Report:
    """The result of a verification. Rows are counted in the data and reject files.

    `shards` counts planned shards, and `committed` those of them that are committed. `rows_in` is the number of rows
    that were read, from the commit records. `duplicates` are rows that are in the output more than once. `missing` are
    rows that were read and are not there, and the expected rows of shards that are not committed. `orphans` are files
    that no commit names. `problems` describes the first 20 problems in words.
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
        """Add a problem. An output with a problem is not ok."""
        if len(self.problems) < _PROBLEMS_LISTED:
            self.problems.append(problem)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary that JSON can hold."""
        return asdict(self)


@dataclass
class _Shard:
    """The counts of one shard's files. `read` is false if its commit record cannot be read."""

    read: bool = True
    rows_in: int = 0
    tagged: int = 0
    rejected: int = 0
    duplicates: int = 0
    missing: int = 0
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify_output(output: Output, *, remove_orphans: bool = False) -> Report:
    """Read every file of an output and count its rows. Compare each file's SHA-256 with the one in its commit record.

    Raises `ConfigError` if there is no output, `StoreError` if the output cannot be read.
    """
    planned = list(list_shards(output))
    if not planned:
        raise ConfigError(f"{output.uri}: there is no plan here, so this is no output of `sightline tag`")
    report = Report(shards=len(planned))
    fingerprint = output.read(FINGERPRINT)
    commits = output.commits()
    report.committed = len(commits)
    for ref in planned:
        if ref.shard not in commits:
            report.missing += max(1, ref.rows)
            report.note(f"shard {ref.shard} is not committed: run `sightline tag` again")
    for shard in sorted(commits.keys() - {ref.shard for ref in planned}):
        report.note(f"commit of {shard}, which is not in the plan")
    named: set[str] = set()
    unread = 0
    for found in _check_all(output, commits, fingerprint):
        report.rows_in += found.rows_in
        report.rows_tagged += found.tagged
        report.rows_rejected += found.rejected
        report.duplicates += found.duplicates
        report.missing += found.missing
        report.files += len(found.files)
        unread += not found.read
        named.update(found.files)
        for problem in found.problems:
            report.note(problem)
    manifest = _check_manifest(output, report)
    unsure = _doubt(named, manifest, unread)
    _check_orphans(output, report, named, remove=remove_orphans, unsure=unsure)
    if report.rows_tagged + report.rows_rejected != report.rows_in:
        report.note(f"{report.rows_in} rows in, {report.rows_tagged} tagged and {report.rows_rejected} rejected")
    report.ok = not report.problems and not report.missing and not report.duplicates
    return report


def _doubt(named: set[str], manifest: set[str] | None, unread: int) -> str:
    """Return why it is unsafe to delete files that no commit names, or an empty string if it is safe.

    `manifest` are the files that the manifest names, or None if there is a manifest that cannot be read. `unread` is
    the number of commit records that cannot be read.
    """
    if unread:
        return f"{unread} commit records cannot be read"
    if manifest is None:
        return "manifest.json cannot be read"
    if manifest - named:
        return f"manifest.json names {len(manifest - named)} files that no commit names"
    return ""


def _check_orphans(output: Output, report: Report, named: set[str], *, remove: bool, unsure: str) -> None:
    """Count or delete the files that no commit names. Only files with names that Sightline writes are deleted."""
    for path in output.files():
        if path in named:
            continue
        if owner_of(path) is None:
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


def _check_all(output: Output, commits: Mapping[str, int], fingerprint: bytes) -> Iterator[_Shard]:
    """Check every committed shard in a few threads. Memory holds one file of each, if it is small."""
    shards = sorted(commits)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(shards), 4 * _THREADS):
            group = shards[start : start + 4 * _THREADS]
            yield from pool.map(lambda shard: _check_shard(output, shard, commits[shard], fingerprint), group)


def _check_shard(output: Output, shard: str, generation: int, fingerprint: bytes) -> _Shard:
    found = _Shard()
    try:
        record = output.read_commit(shard, generation)
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
        numbers = _check_file(output, file, fingerprint, found)
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


def _check_file(output: Output, file: dict[str, Any], fingerprint: bytes, found: _Shard) -> np.ndarray:
    """Check one file's bytes and return its row numbers, int64 (N,): none if the file is missing or broken."""
    nothing = np.zeros(0, np.int64)
    uri = output.uri_of(file["path"])
    try:
        with download(output.store, uri) as stored:
            if stored.sha256 != file.get("sha256"):
                found.problems.append(f"{uri} is not the file that was committed: its SHA-256 differs")
            with pq.ParquetFile(stored.file) as parquet:
                rows = parquet.read(columns=["row"])["row"].to_numpy()
                metadata = parquet.metadata.metadata or {}
    except NotFound:
        found.problems.append(f"{uri} is missing")
        return nothing
    except (pa.ArrowException, OSError) as error:
        found.problems.append(f"{uri} cannot be read: {error}")
        return nothing
    if metadata.get(FINGERPRINT_KEY) != fingerprint:
        found.problems.append(f"{uri} carries another fingerprint")
    return np.asarray(rows)


def _check_manifest(output: Output, report: Report) -> set[str] | None:
    """Compare the manifest with the counts. Return the paths of the files that it names, or None if it is broken."""
    if not output.exists(MANIFEST):
        report.note("there is no manifest.json: the last run did not finish; run `sightline tag` again")
        return set()
    try:
        manifest = json.loads(output.read(MANIFEST))
        said = {name: manifest[name] for name in ("shards", "rows_in", "rows_tagged", "rows_rejected")}
        files = {file["path"] for file in manifest["files"]}
    except (ValueError, KeyError, TypeError) as error:
        report.note(f"manifest.json is broken: {error}")
        return None
    counted = {name: getattr(report, name) for name in said} | {"shards": report.committed}
    if said != counted or len(files) != report.files:
        report.note(f"manifest.json says {said} in {len(files)} files, and there are {counted} in {report.files}")
    return files
