"""Inputs packed into shards. A plan is written before any work, and only ever appended to.

Each planning appends files `plan/000000.parquet` and so on, with one row group for each shard: a reader fetches its own
row group and nothing else, and neither side ever holds the whole plan. A file has a bounded number of shards, because
whoever wants one row group must read what the file says of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.config import JobConfig
from pipelines.inputs.columns import PassedColumns
from pipelines.inputs.listing import KnownInputs, PlanReport, list_new
from pipelines.inputs.rows import Input
from storage.files import StoreFile
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import Entry, Store, StoreOptions, join

SEGMENT_SHARDS, SEGMENT_INPUTS = 256, 500_000
"""A plan file is full at so many shards or inputs: its footer is about 0.3 MB then, and its content about 30 MB."""

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


@dataclass(frozen=True)
class ShardRef:
    """Where a shard's inputs stand: a row group of a plan file. This is all that the driver holds of a shard.

    `rows` is how many images are expected: an estimate where there are tars. `generation` is that of the commit to be
    made: 0 at first, more where rejected rows are taken up again.
    """

    shard: str
    segment: str
    group: int
    rows: int
    generation: int = 0


@dataclass
class Draft:
    """New inputs, packed into plan files that lie in a local folder and are not yet part of the output."""

    report: PlanReport
    columns: PassedColumns
    first: int
    files: list[Path]


def draft_plan(config: JobConfig, options: StoreOptions, columns: PassedColumns, folder: Path) -> Draft:
    """List the inputs, and pack what is not yet planned into new shards. Writes nothing but local files in `folder`.

    Raises `ConfigError` when the configuration does not fit an input, or when there is nothing at all to do.
    """
    report = PlanReport()
    store = open_store(config.output, options)
    segments = list_segments(store, config.output)
    known = KnownInputs(folder / "known.sqlite")
    try:
        for segment in segments:
            known.add(_read_versions(store, segment))
        inputs = list_new(config, options, known, columns, report)
        draft = Draft(report, columns, len(segments), [])
        draft.files += _write_segments(config, folder, len(segments), inputs, report)
    finally:
        known.close()
    if not (report.inputs or report.known or report.waiting or segments):
        counts = ", ".join(f"{count} {why}" for why, count in report.skipped.counts.most_common(4))
        skipped = f" ({counts} skipped)" if counts else ""
        raise ConfigError(f"input: no image, tar or Parquet file under {', '.join(config.input)}{skipped}")
    return draft


def publish_plan(draft: Draft, store: Store, output: str) -> bool:
    """Append a draft to the output's plan. False when another run appended meanwhile: its plan may hold the same
    inputs, so a new draft must be made. What was appended before that stays, and is known to the next draft.
    """
    for number, path in enumerate(draft.files, draft.first):
        if not store.put_if_absent(join(output, "plan", f"{number:06d}.parquet"), path.read_bytes()):
            return False
    return True


def list_segments(store: Store, output: str) -> list[Entry]:
    """The plan files of an output, in the order in which they were written."""
    return sorted((e for e in store.list(join(output, "plan")) if e.uri.endswith(".parquet")), key=lambda e: e.uri)


def list_shards(store: Store, output: str) -> Iterator[ShardRef]:
    """Every planned shard, in order."""
    for segment in list_segments(store, output):
        with StoreFile(store, segment) as raw, pq.ParquetFile(raw) as file:
            groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            rows = file.read(columns=["rows"])["rows"].combine_chunks()
        number, start = segment.uri.rpartition("/")[2].removesuffix(".parquet"), 0
        for group, count in enumerate(groups):
            yield ShardRef(f"{number}-{group:06d}", segment.uri, group, pc.sum(rows.slice(start, count)).as_py() or 0)
            start += count


def read_shard_inputs(store: Store, ref: ShardRef) -> Iterator[Input]:
    """The inputs of one shard."""
    segment = store.stat(ref.segment)
    if segment is None:
        raise ConfigError(f"{ref.segment} is gone: the plan is part of the output and must stay with it")
    with StoreFile(store, segment) as raw, pq.ParquetFile(raw) as file:
        for batch in file.iter_batches(1024, row_groups=[ref.group]):
            for record in batch.drop_columns(["shard"]).to_pylist():
                yield Input(**record)


def _read_versions(store: Store, segment: Entry) -> Iterator[tuple[str, str]]:
    """The URIs and versions of a plan file's inputs."""
    with StoreFile(store, segment) as raw, pq.ParquetFile(raw) as file:
        for batch in file.iter_batches(16_384, columns=["kind", "uri", "size", "etag"]):
            uris, etags = batch["uri"].to_pylist(), batch["etag"].to_pylist()
            for kind, uri, size, etag in zip(
                batch["kind"].to_pylist(), uris, batch["size"].to_pylist(), etags, strict=True
            ):
                yield uri, Input(kind, uri, "", size, etag).version


def _write_segments(
    config: JobConfig, folder: Path, first: int, inputs: Iterable[Input], report: PlanReport
) -> Iterator[Path]:
    """Pack inputs into shards of about `rows_per_shard` rows, and shards into files. Adds to `report`.

    The parts of one input never stand in two files: a planning that ends between them would lose the later ones.
    """
    segment = Segment(folder, first)
    pending: list[Input] = []
    rows, last = 0, ""
    for planned in inputs:
        full = rows >= config.rows_per_shard or (pending and rows + planned.rows > config.rows_per_shard)
        if full:
            segment.add(pending)
            report.shards += 1
            pending, rows = [], 0
            if segment.is_full() and planned.uri != last:
                yield segment.close()
                segment = Segment(folder, segment.number + 1)
        pending.append(planned)
        rows += planned.rows
        report.rows += planned.rows
        last = planned.uri
    if pending:
        segment.add(pending)
        report.shards += 1
    path = segment.close()
    if segment.shards:
        yield path


class Segment:
    """A plan file while it is written."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.shards = self._inputs = 0
        self._path = folder / f"{number:06d}.parquet"
        # Readers look rows up by their place: statistics would only make the footer longer.
        self._writer = pq.ParquetWriter(self._path, _SCHEMA, compression="zstd", write_statistics=False)

    def add(self, inputs: list[Input]) -> None:
        """Write a shard."""
        columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
        for planned in inputs:
            columns["shard"].append(f"{self.number:06d}-{self.shards:06d}")
            for name, value in vars(planned).items():
                columns[name].append(value)
        self._writer.write_table(pa.table(columns, schema=_SCHEMA), row_group_size=len(inputs))
        self.shards += 1
        self._inputs += len(inputs)

    def is_full(self) -> bool:
        """Whether the next shard belongs into another file."""
        return self.shards >= SEGMENT_SHARDS or self._inputs >= SEGMENT_INPUTS

    def close(self) -> Path:
        """Finish the file."""
        self._writer.close()
        return self._path
