"""Input listing to shards. A plan is written once, before any work, and only ever appended to.

Each planning writes one Parquet file, `plan/000000.parquet` and so on, with one row group for each shard: a reader
fetches its own row group and nothing else, and neither side ever holds the whole plan. What is already planned is
kept in a temporary SQLite file while new inputs are compared with it, so ten million loose images need no ten million
Python objects.
"""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.config import JobConfig
from pipelines.sources import (
    IMAGE_SUFFIXES,
    PARQUET_SUFFIXES,
    TAR_SUFFIXES,
    Input,
    Kind,
    estimate_tar_rows,
    image_column,
    map_ahead,
    resolve,
)
from storage.files import StoreFile
from storage.settings import ConfigError
from storage.store import Entry, Store, StoreOptions, join, open_store

LIST_SUFFIXES = (".txt", ".csv")
LIST_COLUMNS = ("uri", "url", "image_uri", "image_url", "path", "image", "file", "file_name")

_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("kind", pa.string()),
        ("uri", pa.string()),
        ("key", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("start", pa.int32()),
        ("stop", pa.int32()),
        ("rows", pa.int64()),
        ("metadata", pa.string()),
    ]
)
_SKIPPED_EXAMPLES = 5
_LOOKS_AHEAD = 16


@dataclass(frozen=True)
class ShardRef:
    """Where a shard's inputs stand: a row group of a plan file. This is all that the driver holds of a shard.

    `rows` is how many images are expected: an estimate where there are tars.
    """

    shard: str
    segment: str
    group: int
    rows: int


@dataclass
class PlanReport:
    """What a planning found. `rows` is an estimate where tars are among the inputs."""

    inputs: int = 0
    shards: int = 0
    rows: int = 0
    known: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_examples: list[str] = field(default_factory=list)

    def skip(self, uri: str, why: str) -> None:
        """Count an object that is no input, and keep the first few by name."""
        self.skipped[why] += 1
        if len(self.skipped_examples) < _SKIPPED_EXAMPLES:
            self.skipped_examples.append(uri)


def extend_plan(config: JobConfig, options: StoreOptions) -> PlanReport:
    """List the inputs and append what is not yet planned, as new shards. Safe to repeat.

    Raises `ConfigError` when an input changed since it was planned (unless `on_changed: retag`), when an input is not
    there, or when there is nothing at all to do.
    """
    report = PlanReport()
    store = open_store(config.output, options)
    segments = list_segments(store, config.output)
    with tempfile.TemporaryDirectory(prefix="sightline-plan-") as folder:
        known = _Known(Path(folder) / "known.sqlite")
        for segment in segments:
            for inputs in _read_segment(store, segment):
                known.add(inputs)
        listing = _new_inputs(config, options, known, report)
        if not _write_segment(store, config, Path(folder) / "plan.parquet", len(segments), listing, report):
            # Another run appended meanwhile. Its plan may hold the same inputs, so the comparison starts again.
            return extend_plan(config, options)
    if not report.inputs and not report.known:
        skipped = f" ({_describe_skipped(report)} skipped)" if report.skipped else ""
        raise ConfigError(f"input: no image, tar or Parquet file under {', '.join(config.input)}{skipped}")
    return report


def list_segments(store: Store, output: str) -> list[Entry]:
    """The plan files of an output, in the order in which they were written."""
    return sorted((e for e in store.list(join(output, "plan")) if e.uri.endswith(".parquet")), key=lambda e: e.uri)


def list_shards(store: Store, output: str) -> Iterator[ShardRef]:
    """Every planned shard, in order."""
    for segment in list_segments(store, output):
        with StoreFile(store, segment) as raw, pq.ParquetFile(raw) as file:
            number = segment.uri.rpartition("/")[2].removesuffix(".parquet")
            for group in range(file.num_row_groups):
                rows = pc.sum(file.read_row_group(group, columns=["rows"])["rows"]).as_py()
                yield ShardRef(f"{number}-{group:06d}", segment.uri, group, rows)


def read_shard_inputs(store: Store, ref: ShardRef) -> Iterator[Input]:
    """The inputs of one shard."""
    segment = store.stat(ref.segment)
    if segment is None:
        raise ConfigError(f"{ref.segment} is gone: the plan is part of the output and must stay with it")
    with StoreFile(store, segment) as raw, pq.ParquetFile(raw) as file:
        for batch in file.iter_batches(1024, row_groups=[ref.group]):
            yield from _to_inputs(batch)


def passed_schema(config: JobConfig, options: StoreOptions) -> pa.Schema:
    """The Arrow types of `parquet.columns`, from the first Parquet input that has each of them.

    Raises `ConfigError` for a column that no input has.
    """
    wanted = dict.fromkeys(config.parquet.columns)
    if not wanted:
        return pa.schema([])
    for entry in _list_inputs(config, options):
        if entry.uri.lower().endswith(PARQUET_SUFFIXES):
            schema, _ = _read_footer(open_store(entry.uri, options), entry)
            for name in [n for n, t in wanted.items() if t is None and schema is not None and n in schema.names]:
                assert schema is not None
                wanted[name] = schema.field(name).type
            if all(wanted.values()):
                break
    for name, type_ in wanted.items():
        if type_ is None:
            raise ConfigError(f"parquet.columns: no Parquet input has a column {name!r}")
    return pa.schema(list(wanted.items()))


class _Known:
    """Inputs that are planned already, on disk: URI, version and row groups."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path)
        self._database.execute("create table known (uri text, version text, primary key (uri, version)) without rowid")

    def add(self, inputs: list[Input]) -> None:
        rows = ((i.uri, _version(i)) for i in inputs)
        self._database.executemany("insert or ignore into known values (?, ?)", rows)

    def versions(self, uri: str) -> list[str]:
        return [row[0] for row in self._database.execute("select version from known where uri = ?", (uri,))]


def _version(planned: Input) -> str:
    """What tells a changed object from the planned one. Names from lists have no version: they were not looked at."""
    return "" if planned.kind == "uri" else f"{planned.size} {planned.etag}"


def _new_inputs(config: JobConfig, options: StoreOptions, known: _Known, report: PlanReport) -> Iterator[Input]:
    """Inputs that are not planned yet, sized up, each once even when two listings overlap."""
    with ThreadPoolExecutor(_LOOKS_AHEAD) as pool:
        unknown = _unknown_inputs(config, options, known, report)
        looks = map_ahead(pool, lambda item: (item, _size_up(item, config, options)), unknown, _LOOKS_AHEAD)
        for planned, parts in looks:
            if parts:
                report.inputs += 1
                yield from parts
            else:
                report.skip(planned.uri, "Parquet files without an image column")


def _unknown_inputs(config: JobConfig, options: StoreOptions, known: _Known, report: PlanReport) -> Iterator[Input]:
    for planned in _classify(config, options, report):
        version, versions = _version(planned), known.versions(planned.uri)
        if version in versions or (versions and ("" in versions or not version)):
            report.known += 1
            continue
        if versions and config.on_changed == "error":
            raise ConfigError(
                f"input: {planned.uri} changed since it was planned: give it a new name, write to a new output, or "
                "set on_changed: retag to tag it once more"
            )
        known.add([planned])
        yield planned


def _size_up(planned: Input, config: JobConfig, options: StoreOptions) -> list[Input]:
    """How many images an input holds, as far as a look at it tells; Parquet files are cut by their row groups."""
    if planned.kind == "tar":
        return [replace(planned, rows=estimate_tar_rows(open_store(planned.uri, options), planned.entry))]
    if planned.kind == "parquet":
        return _split_parquet(planned, config, options)
    return [planned]


def _list_inputs(config: JobConfig, options: StoreOptions) -> Iterator[Entry]:
    """Every object under the configured inputs, except what lies in the output. Raises `ConfigError`."""
    own = config.output + "/"
    for uri in config.input:
        store = open_store(uri, options)
        single = store.stat(uri)
        if single is not None:
            yield single
            continue
        empty = True
        for entry in store.list(uri):
            empty = False
            if not entry.uri.startswith(own):
                yield entry
        if empty and not uri.startswith("s3://") and not Path(uri).is_dir():
            raise ConfigError(f"input: {uri} does not exist")


def _classify(config: JobConfig, options: StoreOptions, report: PlanReport) -> Iterator[Input]:
    roots = [root.rstrip("/") + "/" for root in config.input]
    for entry in _list_inputs(config, options):
        root = next((root for root in roots if entry.uri.startswith(root)), "")
        key = entry.uri.removeprefix(root) if root else entry.uri.rpartition("/")[2]
        name = entry.uri.lower().rpartition("/")[2]
        if not _is_utf8(entry.uri):
            report.skip(entry.uri.encode("utf-8", "replace").decode(), "names that are not UTF-8")
        elif name.startswith("._"):
            report.skip(entry.uri, "hidden files")
        elif name.endswith(LIST_SUFFIXES) and entry.uri in config.input:
            yield from _read_list(open_store(entry.uri, options), entry, report)
        elif name.endswith(TAR_SUFFIXES):
            yield _plan_input("tar", entry, key)
        elif name.endswith(PARQUET_SUFFIXES):
            yield _plan_input("parquet", entry, key)
        elif name.rpartition(".")[2] in IMAGE_SUFFIXES and "." in name:
            yield _plan_input("image", entry, key)
        else:
            suffix = name.rpartition(".")[2] if "." in name.lstrip(".") else ""
            report.skip(entry.uri, f".{suffix} files" if suffix else "files without an extension")


def _plan_input(kind: Kind, entry: Entry, key: str) -> Input:
    return Input(kind, entry.uri, key, entry.size, entry.etag)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_footer(store: Store, entry: Entry) -> tuple[pa.Schema | None, list[int]]:
    """A Parquet file's schema and the rows of each row group; (None, []) when it cannot be read as Parquet."""
    try:
        with StoreFile(store, entry) as raw, pq.ParquetFile(raw) as file:
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            return file.schema_arrow, rows
    except (pa.ArrowException, OSError, ValueError):
        return None, []


def _split_parquet(planned: Input, config: JobConfig, options: StoreOptions) -> list[Input]:
    """Runs of row groups with about `rows_per_shard` rows; none for a file without images.

    An unreadable file stays whole: reading it says why.
    """
    schema, counts = _read_footer(open_store(planned.uri, options), planned.entry)
    if schema is None:
        return [planned]
    if image_column(schema, config.parquet) is None:
        if config.parquet.image_column:
            raise ConfigError(
                f"parquet.image_column: {planned.uri} has no column {config.parquet.image_column!r}; "
                f"it has {', '.join(schema.names)}"
            )
        return []
    if not counts:
        return [replace(planned, rows=0)]
    parts: list[Input] = []
    start, rows = 0, 0
    for group, count in enumerate(counts):
        rows += count
        if rows >= config.rows_per_shard or group == len(counts) - 1:
            parts.append(replace(planned, start=start, stop=group + 1, rows=rows))
            start, rows = group + 1, 0
    return parts


def _read_list(store: Store, entry: Entry, report: PlanReport) -> Iterator[Input]:
    """Images named in a text file (one a line, `#` starts a comment) or a CSV file with a header."""
    text = io.TextIOWrapper(io.BufferedReader(StoreFile(store, entry)), encoding="utf-8-sig", newline="")
    with text:
        try:
            if entry.uri.lower().endswith(".csv"):
                yield from _read_csv(text, entry)
            else:
                for line in text:
                    if (uri := line.strip()) and not line.startswith("#"):
                        yield Input("uri", resolve(uri, entry.uri), uri, -1, "")
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"input: {entry.uri} is not UTF-8 {entry.uri[-3:]}: {error}") from error


def _read_csv(text: io.TextIOWrapper, entry: Entry) -> Iterator[Input]:
    reader = csv.DictReader(text)
    names = reader.fieldnames or []
    column = next((name for name in names if name and name.strip().lower() in LIST_COLUMNS), None)
    if column is None:
        raise ConfigError(
            f"input: {entry.uri} has no column named {', '.join(LIST_COLUMNS[:3])} or such; see its header"
        )
    for record in reader:
        if uri := (record.pop(column) or "").strip():
            rest = {name: value for name, value in record.items() if name}
            yield Input(
                "uri",
                resolve(uri, entry.uri),
                uri,
                -1,
                "",
                metadata=json.dumps(rest, ensure_ascii=False) if rest else None,
            )


def _write_segment(
    store: Store, config: JobConfig, path: Path, number: int, inputs: Iterator[Input], report: PlanReport
) -> bool:
    """Pack inputs into shards and write them as one plan file; nothing when there are none. False: it exists."""
    pending: list[Input] = []
    rows = 0
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:

        def flush() -> None:
            nonlocal pending, rows
            if pending:
                shard = f"{number:06d}-{report.shards:06d}"
                writer.write_table(_to_table(shard, pending), row_group_size=len(pending))
                report.shards += 1
                report.rows += rows
                pending, rows = [], 0

        for planned in inputs:
            if rows + planned.rows > config.rows_per_shard:
                flush()
            pending.append(planned)
            rows += planned.rows
            if rows >= config.rows_per_shard:
                flush()
        flush()
    if not report.shards:
        return True
    return store.put_if_absent(join(config.output, "plan", f"{number:06d}.parquet"), path.read_bytes())


def _to_table(shard: str, inputs: list[Input]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for planned in inputs:
        columns["shard"].append(shard)
        for name, value in vars(planned).items():
            columns[name].append(value)
    return pa.table(columns, schema=_SCHEMA)


def _to_inputs(batch: pa.RecordBatch) -> Iterator[Input]:
    for record in batch.to_pylist():
        record.pop("shard")
        yield Input(**record)


def _read_segment(store: Store, segment: Entry) -> Iterator[list[Input]]:
    with StoreFile(store, segment) as raw, pq.ParquetFile(raw) as file:
        for batch in file.iter_batches(4096):
            yield list(_to_inputs(batch))


def _describe_skipped(report: PlanReport) -> str:
    return ", ".join(f"{count} {why}" for why, count in report.skipped.most_common(4))
