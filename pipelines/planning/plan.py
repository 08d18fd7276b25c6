"""The plan: inputs packed into shards. It is written before any work, and later runs only append to it.

Each run that finds new inputs appends plan files (`plan/000000.parquet` and so on) with one row group for each shard. A
reader fetches only the row group of its shard, and no process holds the whole plan in memory. The number of shards in a
plan file is bounded, because a reader of one row group must read the file's footer, which describes all of them.
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
from pipelines.inputs.rows import Input
from pipelines.output.output import Output, shard_name
from pipelines.planning.listing import InputLister, KnownInputs, PlanReport
from storage.files import StoreFile
from storage.settings import ConfigError
from storage.store import Entry, Store

SEGMENT_SHARDS, SEGMENT_INPUTS, SEGMENT_BYTES = 256, 500_000, 64 * 2**20
"""The most shards, inputs and bytes in a plan file, besides its last shard. A full one has a footer of about 0.3 MB and
a content of about 30 MB. The metadata of images from lists is in it too."""
SHARD_METADATA = 64 << 20
"""A shard whose inputs have more characters of metadata gets no further input: a list's rows may have long texts."""

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
        ("column", pa.string()),
    ]
)


@dataclass(frozen=True)
class ShardRef:
    """A shard to process: the row group `group` of the plan file `segment` holds its inputs.

    The driver holds nothing else of a shard. `rows` is the expected number of images, an estimate if tars are among the
    inputs. `generation` is the generation that the commit will have: 0 at first, and one more each time that rejected
    rows are retried.
    """

    shard: str
    segment: str
    group: int
    rows: int
    generation: int = 0

    @property
    def name(self) -> str:
        """The name of this generation of the shard, as file names, blocks and receipts have it."""
        return shard_name(self.shard, self.generation)


@dataclass
class Draft:
    """Plan files in a local folder, not yet part of the output. `first` is the number of the first file."""

    report: PlanReport
    columns: PassedColumns
    first: int
    files: list[Path]


def draft_plan(config: JobConfig, output: Output, columns: PassedColumns, folder: Path) -> Draft:
    """List the inputs, and pack those that are not planned into new shards. Writes only local files, in `folder`.

    Adds the passed-through columns of new inputs to `columns`. Raises `ConfigError` when the configuration does not fit
    an input, or when there is no input at all.
    """
    report = PlanReport()
    segments = output.segments()
    known = KnownInputs(folder / "known.sqlite")
    try:
        columns_planned: set[str] = set()
        for segment in segments:
            known.add(_read_versions(output.store, segment, columns_planned))
        wanted = config.parquet.image_column
        if wanted is not None and (others := columns_planned - {wanted}):
            report.notes.append(
                f"Parquet files of earlier runs are read from column {', '.join(sorted(others))} as planned, new ones "
                f"from {wanted} (parquet.image_column): give a new output to read all from {wanted}"
            )
        inputs = InputLister(config, output.options, known, columns, report).list_new()
        draft = Draft(report, columns, len(segments), [])
        draft.files += _write_segments(config, folder, len(segments), inputs, report)
    finally:
        known.close()
    if not (report.inputs or report.known or report.waiting or segments):
        counts = ", ".join(f"{count} {why}" for why, count in report.skipped.counts.most_common(4))
        skipped = f" ({counts} skipped)" if counts else ""
        raise ConfigError(f"input: no image, tar or Parquet file under {', '.join(config.input)}{skipped}")
    return draft


def publish_plan(draft: Draft, output: Output) -> bool:
    """Append a draft to the output's plan. Return False if another run has appended to the plan since the draft.

    That run may have planned the same inputs, so the caller must make a new draft. Files of this draft that were
    appended before stay in the plan, and the new draft takes them into account.
    """
    for number, path in enumerate(draft.files, draft.first):
        if not output.put_if_absent(f"plan/{number:06d}.parquet", path.read_bytes()):
            return False
    return True


def list_shards(output: Output) -> Iterator[ShardRef]:
    """Yield all planned shards, in order."""
    for segment in output.segments():
        with StoreFile(output.store, segment) as raw, pq.ParquetFile(raw) as file:
            groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            rows = file.read(columns=["rows"])["rows"].combine_chunks()
        number, start = segment.uri.rpartition("/")[2].removesuffix(".parquet"), 0
        for group, count in enumerate(groups):
            yield ShardRef(f"{number}-{group:06d}", segment.uri, group, pc.sum(rows.slice(start, count)).as_py() or 0)
            start += count


def read_shard_inputs(store: Store, ref: ShardRef) -> Iterator[Input]:
    """Yield the inputs of a shard. Raises `ConfigError` if the plan file is missing."""
    segment = store.stat(ref.segment)
    if segment is None:
        raise ConfigError(f"{ref.segment} is gone: the plan is part of the output and must stay with it")
    with StoreFile(store, segment) as raw, pq.ParquetFile(raw) as file:
        for batch in file.iter_batches(1024, row_groups=[ref.group]):
            for record in batch.drop_columns(["shard"]).to_pylist():
                yield Input(**record)


def _read_versions(store: Store, segment: Entry, columns: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the URI and version of each input in a plan file. Adds the image columns of Parquet files to `columns`."""
    with StoreFile(store, segment) as raw, pq.ParquetFile(raw) as file:
        # Plans of earlier versions have no image column; a column that a file does not have is not read.
        for batch in file.iter_batches(4096, columns=["kind", "uri", "size", "etag", "metadata", "column"]):
            for record in batch.to_pylist():
                planned = Input(key="", **record)
                if planned.column is not None:
                    columns.add(planned.column)
                yield planned.uri, planned.version


def _write_segments(
    config: JobConfig, folder: Path, first: int, inputs: Iterable[Input], report: PlanReport
) -> Iterator[Path]:
    """Pack inputs into shards of about `rows_per_shard` rows, and shards into plan files. Adds to `report`.

    All parts of one input are in one plan file: a run that is killed between two files would lose the later parts,
    because the next run takes the input for planned. Rows of a list are counted, so they may be in several files.
    """
    segment = Segment(folder, first)
    pending: list[Input] = []
    rows, held, last = 0, 0, ""
    for planned in inputs:
        full = rows >= config.rows_per_shard or (pending and rows + planned.rows > config.rows_per_shard)
        if full or held > SHARD_METADATA:
            segment.add(pending)
            report.shards += 1
            pending, rows, held = [], 0, 0
            if segment.is_full() and (planned.uri != last or planned.kind == "uri"):
                yield segment.close()
                segment = Segment(folder, segment.number + 1)
        pending.append(planned)
        rows += planned.rows
        held += len(planned.metadata or "")
        report.rows += planned.rows
        last = planned.uri
    if pending:
        segment.add(pending)
        report.shards += 1
    path = segment.close()
    if segment.shards:
        yield path


class Segment:
    """A plan file that is being written to a local folder."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.shards = self._inputs = 0
        self._path = folder / f"{number:06d}.parquet"
        # No reader filters by value, so statistics would only make the footer longer.
        self._writer = pq.ParquetWriter(self._path, _SCHEMA, compression="zstd", write_statistics=False)

    def add(self, inputs: list[Input]) -> None:
        """Write a shard as the next row group."""
        columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
        for planned in inputs:
            columns["shard"].append(f"{self.number:06d}-{self.shards:06d}")
            for name, value in vars(planned).items():
                columns[name].append(value)
        self._writer.write_table(pa.table(columns, schema=_SCHEMA), row_group_size=len(inputs))
        self.shards += 1
        self._inputs += len(inputs)

    def is_full(self) -> bool:
        """Tell whether the next shard belongs in a new file."""
        return (
            self.shards >= SEGMENT_SHARDS
            or self._inputs >= SEGMENT_INPUTS
            or self._path.stat().st_size >= SEGMENT_BYTES
        )

    def close(self) -> Path:
        """Finish the file and return its path."""
        self._writer.close()
        return self._path
