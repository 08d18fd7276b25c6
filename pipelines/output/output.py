"""`Output`: the folder or S3 prefix that a job writes to, with its commit records and its manifest.

Its files:

    fingerprint.json               the model, the label set and the settings that made the output
    labels.parquet                 the head of the label set: it scores the embeddings
    plan/000000.parquet            the inputs, packed into shards
    parts/<shard>/<id>.arrow       rows of a shard in progress
    data/<shard>-<id>.parquet      tagged rows of a committed shard
    rejects/<shard>-<id>.parquet   rejected rows of a committed shard
    commits/<shard>.json           the commit record: it makes a shard committed, and names its files
    manifest.json                  totals and files, as of the last run that finished

A shard whose rejected rows were retried has a commit record for each generation: `commits/<shard>.1.json` and so on.
The record of the highest generation is the valid one. It also names the files that earlier generations left valid.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.inputs.rows import fold_suffixes
from storage.files import StoreFile
from storage.schemes import open_store
from storage.store import Entry, Store, StoreError, StoreOptions, join

FINGERPRINT = "fingerprint.json"
LABELS = "labels.parquet"
MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
"""Version of the keys of `manifest.json`."""

_THREADS = 16
"""Commit records that are fetched at the same time."""
_TOP_LABELS = 100
"""Labels that the manifest counts."""


_SHARD = re.compile(r"(?P<shard>\d{6}-\d{6})(\.(?P<generation>\d+))?")
_FILE = re.compile(rf"\.?{_SHARD.pattern}-[0-9a-f]{{12}}\.parquet(\.[0-9a-f]{{32}}\.tmp)?")
_OWN_NAMES = (
    (re.compile(rf"(.*)/(?:labels\.parquet|plan/\d{{6}}\.parquet|(?:data|rejects)/{_FILE.pattern})"), FINGERPRINT),
    (re.compile(r"(.*)/sample\.parquet"), "sample.json"),
)
"""Names of the Parquet files of outputs and of samples, each with a file that lies in the folder of the first group."""
_PART = re.compile(r"\.?[0-9a-f]{32}\.arrow(\.[0-9a-f]{32}\.tmp)?")


@dataclass(frozen=True)
class Output:
    """An output: its URI and how to reach its store, which is opened when it is first used.

    An `Output` can be pickled; the copy opens the store again. Paths are relative to the URI, such as
    `data/000000-000000-0123456789ab.parquet`. Every method raises `storage.store.StoreError` for trouble of the store.
    """

    uri: str
    options: StoreOptions = StoreOptions()

    @cached_property
    def store(self) -> Store:
        """The store that holds the output."""
        return open_store(self.uri, self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "options": self.options}

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

    def read_batches(self, file: Mapping[str, Any], columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a data or reject file, given by its entry in a commit record.

        `columns` are all columns by default. Memory holds at most 65,536 rows of them, so this is for columns with
        small values. Raises `StoreError`, also if the file cannot be read as Parquet.
        """
        with open_row_file(self.store, self.uri_of(file["path"]), file["bytes"]) as parquet:
            yield from parquet.iter_batches(columns=columns)

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
        """Yield the paths of all files in `data/`, `rejects/` and `parts/`, including files that no run wrote."""
        for kind in ("data", "rejects", "parts"):
            for entry in self.store.list(self.uri_of(kind)):
                yield self.path_of(entry.uri)

    def commits(self) -> dict[str, int]:
        """Return the committed shards, each with its highest generation."""
        found: dict[str, int] = {}
        for entry in self.store.list(self.uri_of("commits")):
            if parsed := parse_commit_path(entry.uri):
                shard, generation = parsed
                found[shard] = max(generation, found.get(shard, 0))
        return found

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

    def read_commits(self, commits: Mapping[str, int]) -> Iterator[dict[str, Any]]:
        """Yield the commit records of shards at given generations, in order. A few are fetched ahead."""
        shards = list(commits)
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(shards), 4 * _THREADS):
                group = shards[start : start + 4 * _THREADS]
                yield from pool.map(lambda shard: self.read_commit(shard, commits[shard]), group)

    def finish(
        self,
        fingerprint: dict[str, Any],
        planned: Iterable[str],
        run: dict[str, Any],
        waiting: list[dict[str, Any]],
    ) -> dict[str, Any]:
        """Add up the commit records of the planned shards, delete leftover files, write `manifest.json` and return it.

        Leftover files are those of a committed shard that its commit record does not name, of this or an earlier
        generation. No later commit can name them, because each generation is committed once. All other files may
        belong to a run in progress and are kept.

        `run` is the report of this run, `waiting` the shards and inputs that could not be read now. Raises `StoreError`
        when a commit record is damaged; then nothing is deleted.
        """
        shards = list(planned)
        found = self.commits()
        commits = {shard: found[shard] for shard in shards if shard in found}
        totals: Counter[str] = Counter(rows_in=0, rows_tagged=0, rows_rejected=0)
        reasons: Counter[str] = Counter()
        labels: Counter[str] = Counter()
        skipped: Counter[str] = Counter()
        files: list[dict[str, Any]] = []
        for record in self.read_commits(commits):
            for name in totals:
                totals[name] += record[name]
            reasons.update(record["reasons"])
            labels.update(record["labels"])
            skipped.update(record.get("skipped", {}))
            files += record["files"]
        named = {file["path"] for file in files}
        for path in self.files():
            owner = owner_of(path)
            if path not in named and owner is not None and owner[1] <= commits.get(owner[0], -1):
                self.delete(path)
        manifest = {
            "schema_version": MANIFEST_VERSION,
            "fingerprint": fingerprint,
            "planned_shards": len(shards),
            "shards": len(commits),
            "generations": sum(commits.values()),
            **totals,
            "reasons": dict(reasons.most_common()),
            "skipped_members": fold_suffixes(skipped),
            "top_labels": dict(labels.most_common(_TOP_LABELS)),
            "waiting": waiting,
            "run": run,
            "files": files,
        }
        self.store.put(self.uri_of(MANIFEST), json.dumps(manifest, ensure_ascii=False, indent=1).encode())
        return manifest


@contextmanager
def open_row_file(store: Store, uri: str, size: int) -> Iterator[pq.ParquetFile]:
    """Open a data or reject file, whose size is that of its entry in a commit record.

    Raises `StoreError`, also if the file cannot be opened or read as Parquet.
    """
    # No ETag, only the size: file names are never reused, and the files of a copied output have other ETags.
    try:
        with StoreFile(store, Entry(uri, size, "")) as raw, pq.ParquetFile(raw) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{uri} cannot be read: {error}") from error


def shard_name(shard: str, generation: int = 0) -> str:
    """Return the name of one generation of a shard, as file names, blocks and receipts have it."""
    return shard if generation == 0 else f"{shard}.{generation}"


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
