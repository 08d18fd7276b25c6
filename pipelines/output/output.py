"""`Output`: the folder or S3 prefix that a job writes to, with its commit records and its manifest.

Its files:

    fingerprint.json               the model, the label set and the settings that made the output
    labels.parquet                 the head of the label set: it scores the embeddings
    plan/000000.parquet            the inputs, packed into shards
    parts/<shard>/<id>.arrow       rows of a shard in progress
    data/<shard>-<id>.parquet      tagged rows of a committed shard
    rejects/<shard>-<id>.parquet   rejected rows of a committed shard
    data/merged-<time>-<id>.parquet   rows of several shards, from a compaction; in `rejects/` too
    commits/<shard>.json           the commit record: it makes a shard committed, and names its files
    ledger/000000.parquet          the committed shards with their files, many in one file
    runs/<id>.json                 the segments that a run works on, until it ends
    manifest.json                  totals, and the number of ledgers, as of the last run that finished
    tables.json                    the tables of the output, if it has some; Delta's are in `data/_delta_log` and so on

A shard whose rejected rows were retried has a commit record for each generation: `commits/<shard>.1.json` and so on.
The record of the highest generation is the valid one. It also names the files that earlier generations left valid.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.files import StoreFile
from storage.schemes import is_remote, open_store, refuse_output
from storage.store import Entry, Store, StoreError, StoreOptions, join

FINGERPRINT = "fingerprint.json"
LABELS = "labels.parquet"
TABLES = "tables.json"
MANIFEST = "manifest.json"
DELTA_LOG = "_delta_log"
"""The folder of a Delta table's log, in `data/` and in `rejects/`."""
MANIFEST_VERSION = 2
"""Version of the keys of `manifest.json`."""

_THREADS = 16
"""Commit records that are fetched at the same time."""
_PREFIXES = 16
"""The most segments whose files are listed one by one. The files of more are found in a listing of the folder."""


_SHARD = re.compile(r"(?P<shard>\d{6}-\d{6})(\.(?P<generation>\d+))?")
_FILE = re.compile(rf"\.?{_SHARD.pattern}-[0-9a-f]{{12}}\.parquet(\.[0-9a-f]{{32}}\.tmp)?")
_MERGED = re.compile(r"\.?merged-(?P<time>\d{8}T\d{6})-[0-9a-f]{12}\.parquet(\.[0-9a-f]{32}\.tmp)?")
_MERGED_TIME = "%Y%m%dT%H%M%S"
_OWN_NAMES = (
    (
        re.compile(
            r"(.*)/(?:labels\.parquet|(?:plan|ledger)/\d{6}\.parquet|"
            rf"(?:data|rejects)/(?:{_FILE.pattern}|\.?merged-\d{{8}}T\d{{6}}-[0-9a-f]{{12}}\.parquet))"
        ),
        FINGERPRINT,
    ),
    (re.compile(r"(.*)/sample\.parquet"), "sample.json"),
)
"""Names of the Parquet files of outputs and of samples, each with a file that lies in the folder of the first group."""
PATIENT_ATTEMPTS = 8
"""Attempts at a request once an output's store has answered. An object store that is restarted, or whose leader is
elected anew, refuses connections for up to a minute, and that should not end a night's run."""
_PART = re.compile(r"\.?[0-9a-f]{32}\.arrow(\.[0-9a-f]{32}\.tmp)?")


@dataclass(frozen=True)
class Output:
    """An output: its URI and how to reach its store, which is opened when it is first used.

    An `Output` can be pickled; the copy opens the store again. Paths are relative to the URI, such as
    `data/000000-000000-0123456789ab.parquet`. Every method raises `storage.store.StoreError` for trouble of the store.
    """

    uri: str
    options: StoreOptions = StoreOptions()
    patient: bool = False
    """Whether requests are tried for about a minute, as `PATIENT_ATTEMPTS` says. `options` is not changed by it."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a store that is only read."""
        refuse_output(self.uri)

    @cached_property
    def store(self) -> Store:
        """The store that holds the output."""
        return open_store(self.uri, replace(self.options, attempts=PATIENT_ATTEMPTS) if self.patient else self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "options": self.options, "patient": self.patient}

    def uri_of(self, path: str) -> str:
        """Return the URI of a file of the output."""
        return join(self.uri, path)

    def path_of(self, uri: str) -> str:
        """Return the path in the output of a file's URI."""
        return uri.removeprefix(self.uri.rstrip("/") + "/")

    def read(self, path: str) -> bytes:
        """Read a file. Raises `storage.store.NotFound` if there is none."""
        return self.store.read(self.uri_of(path))

    def read_json(self, path: str) -> dict[str, Any]:
        """Read a JSON object. Raises `NotFound`, or `StoreError` if the file does not hold a JSON object."""
        uri = self.uri_of(path)
        try:
            value = json.loads(self.store.read(uri))
        except ValueError as error:
            raise StoreError(f"{uri} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise StoreError(f"{uri} is not a JSON object")
        return value

    @contextmanager
    def open_rows(self, path: str, size: int) -> Iterator[pq.ParquetFile]:
        """Open a data or reject file of `size` bytes.

        Raises `StoreError`, also if the file cannot be opened or read as Parquet.
        """
        uri = self.uri_of(path)
        # No ETag, only the size: file names are never reused, and the files of a copied output have other ETags.
        try:
            with StoreFile(self.store, Entry(uri, size, "")) as raw, pq.ParquetFile(raw) as parquet:
                yield parquet
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"{uri} cannot be read: {error}") from error

    def exists(self, path: str) -> bool:
        """Tell whether there is a file at this path."""
        return self.store.stat(self.uri_of(path)) is not None

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write a file unless there is one. Return True if the file then holds `data`, also from another run."""
        return self.store.put_if_absent(self.uri_of(path), data)

    def delete(self, path: str) -> None:
        """Delete a file, if it is there."""
        self.store.delete(self.uri_of(path))

    def segments(self) -> list[Entry]:
        """Return the plan files, in the order in which they were written."""
        found = (entry for entry in self.store.list(self.uri_of("plan")) if entry.uri.endswith(".parquet"))
        return sorted(found, key=lambda entry: entry.uri)

    def files(self) -> Iterator[str]:
        """Yield the paths of all files in `data/`, `rejects/` and `parts/`, including files that no run wrote.

        The logs of Delta tables are left out.
        """
        for kind in ("data", "rejects", "parts"):
            for entry in self.store.list(self.uri_of(kind)):
                path = self.path_of(entry.uri)
                if not path.startswith(f"{kind}/{DELTA_LOG}/"):
                    yield path

    def list_commits(self, segments: Collection[int]) -> Iterator[tuple[str, int]]:
        """Yield the committed shards of some segments with their generations, one for each record."""
        for name in self.list_names("commits", segments):
            if parsed := parse_commit_path(name):
                yield parsed

    def list_names(self, folder: str, segments: Collection[int]) -> Iterator[str]:
        """Yield the names of the files in `commits`, `data` or `rejects` that belong to shards of some segments.

        On a disk, temporary files are named too: a killed run leaves them.
        """
        # A disk reads the whole folder each time.
        if is_remote(self.uri) and len(segments) <= _PREFIXES:
            for segment in sorted(segments):
                yield from self.store.names(self.uri_of(folder), f"{segment:06d}-")
            return
        for name in self.store.names(self.uri_of(folder)) if segments else ():
            number = name.removeprefix(".")[:6]
            if number.isdecimal() and int(number) in segments:
                yield name

    def read_commit(self, shard: str, generation: int = 0) -> dict[str, Any]:
        """Read a commit record. Raises `NotFound`, or `StoreError` if the record is damaged or another shard's."""
        path = commit_path(shard, generation)
        record = self.read_json(path)
        counts = ("rows_in", "rows_tagged", "rows_rejected")
        valid = (
            record.get("shard") == shard
            and all(isinstance(record.get(name), int) for name in counts)
            and all(isinstance(record.get(name), dict) for name in ("reasons", "labels"))
            and isinstance(record.get("files"), list)
            and all(isinstance(file, dict) and isinstance(file.get("path"), str) for file in record["files"])
        )
        if not valid:
            raise StoreError(f"{self.uri_of(path)} is damaged: it is no commit record of shard {shard}")
        return record

    def read_commits(self, commits: Iterable[tuple[str, int]]) -> Iterator[dict[str, Any]]:
        """Yield the commit records of shards at given generations, in order. A few are fetched ahead."""
        pairs = iter(commits)
        with ThreadPoolExecutor(_THREADS) as pool:
            while group := list(islice(pairs, 4 * _THREADS)):
                yield from pool.map(lambda pair: self.read_commit(*pair), group)


def shard_name(shard: str, generation: int = 0) -> str:
    """Return the name of one generation of a shard, as file names, blocks and receipts have it."""
    return shard if generation == 0 else f"{shard}.{generation}"


def shard_id(segment: int, number: int) -> str:
    """Return the name of a shard from the number of its segment and its number in the segment."""
    return f"{segment:06d}-{number:06d}"


def parse_shard(shard: str) -> tuple[int, int]:
    """Return the numbers of a shard's segment and of the shard in it."""
    segment, _, number = shard.partition("-")
    return int(segment), int(number)


def commit_path(shard: str, generation: int = 0) -> str:
    """Return the path of a commit record in the output."""
    return f"commits/{shard_name(shard, generation)}.json"


def parse_commit_path(path: str) -> tuple[str, int] | None:
    """Return the shard and generation of a commit record by its path, or None if the path is not a record's."""
    return _parse(_SHARD.fullmatch(path.rpartition("/")[2].removesuffix(".json")))


def owner_of(path: str) -> tuple[str, int] | None:
    """Return the shard and generation that a data, reject or part file was written for, by its path in the output.

    Temporary files of local disks count as well. Returns None if Sightline does not write files with such a name.
    """
    kind, _, rest = path.partition("/")
    folder, _, name = rest.rpartition("/")
    match = None
    if kind in ("data", "rejects") and not folder:
        match = _FILE.fullmatch(name)
    elif kind == "parts" and _PART.fullmatch(name):
        match = _SHARD.fullmatch(folder)
    return _parse(match)


def merged_at(path: str) -> datetime | None:
    """Return when a merged data or reject file was written, by its path in the output. None for other files.

    Temporary files of local disks count as well.
    """
    kind, _, name = path.partition("/")
    found = _MERGED.fullmatch(name) if kind in ("data", "rejects") else None
    try:
        return datetime.strptime(found["time"], _MERGED_TIME).replace(tzinfo=UTC) if found else None
    except ValueError:  # not a time, so no compaction wrote it
        return None


def name_merged() -> str:
    """Return the beginning of the name of a merged file that is written now."""
    return f"merged-{datetime.now(UTC).strftime(_MERGED_TIME)}"


def find_marker(uri: str) -> str | None:
    """Return which file must exist if a Parquet file is of an output or of a sample, by the Parquet file's name.

    Returns None if neither has files of such a name. The folder of the file is that of the output or of the sample.
    """
    for pattern, marker in _OWN_NAMES if uri.endswith(".parquet") else ():  # a listing has millions of other names
        if found := pattern.fullmatch(uri):
            return join(found[1], marker)
    return None


def _parse(match: re.Match[str] | None) -> tuple[str, int] | None:
    return (match["shard"], int(match["generation"] or 0)) if match else None
