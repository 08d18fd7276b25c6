"""What an output holds: where each file stands, its schema, its commits, its manifest.

    fingerprint.json               the model, the label set and the settings that made it
    labels.parquet                 the label set's head: what its embeddings are scored with
    plan/000000.parquet            the inputs, packed into shards
    parts/<shard>/<id>.arrow       rows of a shard in work
    data/<shard>-<id>.parquet      tagged rows of a committed shard
    rejects/<shard>-<id>.parquet   its rejected rows
    commits/<shard>.json           the record that makes a shard committed, and names its files
    manifest.json                  totals and files, as the last run left them

A shard whose rejected rows were taken up again has a further record, `commits/<shard>.1.json` and so on. The highest
generation counts, and names the files of all of them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from storage.store import Store, StoreError, join

SCHEMA_VERSION = 1
COLUMN_PREFIX = "column:"
"""Before the names of passed columns until they are committed, so that they may be named like those of the stages."""

_THREADS = 16
_TOP_LABELS = 100
_NAME = re.compile(r"(?P<shard>\d{6}-\d{6})(\.(?P<generation>\d+))?")
_FILE = re.compile(rf"\.?{_NAME.pattern}-[0-9a-f]{{12}}\.parquet(\.[0-9a-f]{{32}}\.tmp)?")
_PART = re.compile(r"\.?[0-9a-f]{32}\.arrow(\.[0-9a-f]{32}\.tmp)?")


@dataclass(frozen=True)
class OutputFormat:
    """The schema of the output: what the configuration can change about it. `bands` where a label set has them."""

    width: int
    embedding_dtype: Literal["float32", "float16"]
    thumbnails: bool
    columns: pa.Schema
    bands: bool = False

    def data_schema(self) -> pa.Schema:
        """`data/`: one row for each tagged image."""
        dtype = pa.float16() if self.embedding_dtype == "float16" else pa.float32()
        fields = [
            pa.field("key", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("labels", pa.list_(pa.string())),
            pa.field("scores", pa.list_(pa.float32())),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(dtype, self.width)),
            pa.field("metadata", pa.string()),
        ]
        if self.bands:
            fields.append(pa.field("bands", pa.list_(pa.string())))
        if self.thumbnails:
            fields.append(pa.field("thumbnail", pa.binary()))
        return pa.schema([*fields, *self.columns])

    def rejects_schema(self) -> pa.Schema:
        """`rejects/`: one row for each image that could not be tagged."""
        names = ("key", "source", "row", "stage", "reason", "detail")
        return pa.schema([pa.field(name, pa.int64() if name == "row" else pa.string()) for name in names])

    def part_schema(self) -> pa.Schema:
        """`parts/`: both kinds of row, and a rejected one has no size, labels or embedding."""
        passed = [field.with_name(COLUMN_PREFIX + field.name) for field in self.columns]
        own = [field for field in self.data_schema() if field.name not in self.columns.names]
        reject = [field for field in self.rejects_schema() if field.name not in {field.name for field in own}]
        return pa.schema([field.with_nullable(True) for field in [*own, *reject, *passed]])


def shard_name(shard: str, generation: int) -> str:
    """A shard at one generation, as its files and rows in flight are named."""
    return shard if generation == 0 else f"{shard}.{generation}"


def commit_uri(output: str, shard: str, generation: int = 0) -> str:
    """Where a shard's commit record stands."""
    return join(output, "commits", f"{shard_name(shard, generation)}.json")


def list_commits(store: Store, output: str) -> dict[str, int]:
    """The committed shards, each with its highest generation."""
    found: dict[str, int] = {}
    for entry in store.list(join(output, "commits")):
        name = _NAME.fullmatch(entry.uri.rpartition("/")[2].removesuffix(".json"))
        if name:
            shard, generation = name["shard"], int(name["generation"] or 0)
            found[shard] = max(generation, found.get(shard, 0))
    return found


def read_commit(store: Store, output: str, shard: str, generation: int = 0) -> dict[str, Any]:
    """A shard's commit record. Raises `StoreError` when it cannot be read or is damaged."""
    uri = commit_uri(output, shard, generation)
    record = read_json(store, uri)
    counts = ("rows_in", "rows_tagged", "rows_rejected")
    whole = (
        record.get("shard") == shard
        and all(isinstance(record.get(name), int) for name in counts)
        and all(isinstance(record.get(name), dict) for name in ("reasons", "labels"))
        and isinstance(record.get("files"), list)
        and all(isinstance(file, dict) and isinstance(file.get("path"), str) for file in record["files"])
    )
    if not whole:
        raise StoreError(f"{uri} is damaged: it is no commit record of shard {shard}")
    return record


def read_commits(store: Store, output: str, commits: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """The commit records of these shards at these generations, in order, a few fetched ahead."""
    shards = list(commits)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(shards), 4 * _THREADS):
            group = shards[start : start + 4 * _THREADS]
            yield from pool.map(lambda shard: read_commit(store, output, shard, commits[shard]), group)


def read_json(store: Store, uri: str) -> dict[str, Any]:
    """A JSON object of the output. Raises `StoreError` when it is none."""
    try:
        value = json.loads(store.read(uri))
    except ValueError as error:
        raise StoreError(f"{uri} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise StoreError(f"{uri} is not a JSON object")
    return value


def list_output_files(store: Store, output: str) -> Iterator[str]:
    """The URIs of all data, reject and part files, whoever wrote them."""
    for kind in ("data", "rejects", "parts"):
        for entry in store.list(join(output, kind)):
            yield entry.uri


def owner_of(output: str, uri: str) -> tuple[str, int] | None:
    """The shard and generation that a file was written for, by its name; None when the name is not one of ours."""
    kind, _, rest = uri.removeprefix(output.rstrip("/") + "/").partition("/")
    folder, _, name = rest.rpartition("/")
    match = None
    if kind in ("data", "rejects") and not folder:
        match = _FILE.fullmatch(name)
    elif kind == "parts" and _PART.fullmatch(name):
        match = _NAME.fullmatch(folder)
    return (match["shard"], int(match["generation"] or 0)) if match else None


def finish_output(
    store: Store,
    output: str,
    fingerprint: dict[str, Any],
    planned: Iterable[str],
    run: dict[str, Any],
    waiting: list[dict[str, Any]],
) -> dict[str, Any]:
    """Sum up the commits of the planned shards, remove what killed runs left, and put and return `manifest.json`.

    Removed are files of a committed shard which its record does not name, at its generation or an earlier one: no later
    commit can name them, because each generation is committed once. Everything else may be a run's that is under way.

    Raises `StoreError`, having removed nothing, when a commit record is damaged.
    """
    shards = list(planned)
    there = list_commits(store, output)
    commits = {shard: there[shard] for shard in shards if shard in there}
    totals: Counter[str] = Counter(rows_in=0, rows_tagged=0, rows_rejected=0)
    reasons: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    files: list[dict[str, Any]] = []
    for record in read_commits(store, output, commits):
        for name in totals:
            totals[name] += record[name]
        reasons.update(record["reasons"])
        labels.update(record["labels"])
        skipped.update(record.get("skipped", {}))
        files += record["files"]
    named = {join(output, file["path"]) for file in files}
    for uri in list_output_files(store, output):
        owner = owner_of(output, uri)
        if uri not in named and owner is not None and owner[1] <= commits.get(owner[0], -1):
            store.delete(uri)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "planned_shards": len(shards),
        "shards": len(commits),
        "generations": sum(commits.values()),
        **totals,
        "reasons": dict(reasons.most_common()),
        "skipped_members": dict(skipped.most_common()),
        "top_labels": dict(labels.most_common(_TOP_LABELS)),
        "waiting": waiting,
        "run": run,
        "files": files,
    }
    store.put(join(output, "manifest.json"), json.dumps(manifest, ensure_ascii=False, indent=1).encode())
    return manifest
