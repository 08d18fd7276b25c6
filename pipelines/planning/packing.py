"""Packing: inputs into shards, and shards into the plan files of `pipelines.planning.plan`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import JobConfig
from pipelines.inputs.rows import Input
from pipelines.planning.listing import PlanReport

SEGMENT_SHARDS, SEGMENT_INPUTS, SEGMENT_BYTES = 10_000, 500_000, 64 * 2**20
"""The most shards, inputs and bytes in a segment, besides its last shard. The metadata of images from lists counts."""
GROUP_INPUTS = 4096
"""The fewest inputs in a row group, besides the last one."""
SHARD_METADATA = 64 << 20
"""A shard whose inputs have more characters of metadata gets no further input: a list's rows may have long texts."""

SEGMENT_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("kind", pa.string()),
        ("uri", pa.string()),
        ("key", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("start", pa.int32()),
        ("stop", pa.int32()),
        ("images", pa.int64()),
        ("metadata", pa.string()),
        ("column", pa.string()),
    ]
)


def write_segments(
    config: JobConfig, first: int, inputs: Iterable[Input], report: PlanReport
) -> Iterator[tuple[int, bytes]]:
    """Pack inputs into shards of about `rows_per_shard` rows, and shards into segments. Adds to `report`.

    All parts of one input are in one segment: a run that is killed between two segments would lose the later parts,
    because the next run takes the input for planned. Rows of a list are counted, so they may be in several segments.
    """
    segment = SegmentWriter(first)
    pending: list[Input] = []
    rows, held, last = 0, 0, ""
    for planned in inputs:
        full = rows >= config.rows_per_shard or (pending and rows + planned.rows > config.rows_per_shard)
        if full or held > SHARD_METADATA:
            segment.add(pending)
            report.shards += 1
            pending, rows, held = [], 0, 0
            if segment.is_full() and (planned.uri != last or planned.kind == "uri"):
                yield segment.number, segment.close()
                segment = SegmentWriter(segment.number + 1)
        pending.append(planned)
        rows += planned.rows
        held += len(planned.metadata or "")
        report.rows += planned.rows
        last = planned.uri
    if pending:
        segment.add(pending)
        report.shards += 1
    data = segment.close()
    if segment.shards:
        yield segment.number, data


class SegmentWriter:
    """Writes a plan file, in memory."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.shards = self._inputs = self._bytes = 0
        self._buffer = io.BytesIO()
        self._waiting: dict[str, list[Any]] = {name: [] for name in SEGMENT_SCHEMA.names}
        # Statistics of the shard let other readers skip row groups; those of other columns only make the footer longer.
        self._writer = pq.ParquetWriter(self._buffer, SEGMENT_SCHEMA, compression="zstd", write_statistics=["shard"])

    def add(self, inputs: list[Input]) -> None:
        """Add the next shard."""
        name = f"{self.number:06d}-{self.shards:06d}"
        for planned in inputs:
            values = vars(planned)
            for column in SEGMENT_SCHEMA.names:
                value = name if column == "shard" else values["rows" if column == "images" else column]
                self._waiting[column].append(value)
            self._bytes += len(planned.metadata or "")
        self.shards += 1
        self._inputs += len(inputs)
        if len(self._waiting["shard"]) >= GROUP_INPUTS or self._bytes >= SHARD_METADATA:
            self._write_group()

    def is_full(self) -> bool:
        """Tell whether the next shard belongs in a new file."""
        return self.shards >= SEGMENT_SHARDS or self._inputs >= SEGMENT_INPUTS or self._buffer.tell() >= SEGMENT_BYTES

    def close(self) -> bytes:
        """Finish the file and return its content."""
        if self._waiting["shard"]:
            self._write_group()
        self._writer.close()
        return self._buffer.getvalue()

    def _write_group(self) -> None:
        rows = len(self._waiting["shard"])
        self._writer.write_table(pa.table(self._waiting, schema=SEGMENT_SCHEMA), row_group_size=rows)
        self._waiting, self._bytes = {name: [] for name in SEGMENT_SCHEMA.names}, 0
