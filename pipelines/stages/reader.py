"""The first stage: a shard's images, read, decoded and numbered, as blocks of Arrow.

A shard's rows travel as blocks of one schema. Pixels are a binary column, empty for a rejected row, so that a
rejected row costs the model nothing. The last row of every shard is a marker without an image: it says how the reading
ended, and how many rows the shard has, which for a tar is known only at its end.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.inputs.formats import read_inputs
from pipelines.inputs.plan import ShardRef, read_shard_inputs
from pipelines.inputs.rows import Input, Reading, Row, Skipped, wait_reason
from pipelines.output.layout import COLUMN_PREFIX, shard_name
from pipelines.output.parts import MARKER, Ending, encode_rows
from pipelines.output.retry import find_retry, read_retried
from siglip.config import ImageSpec, Limits, count_cores, prefer_throughput
from siglip.images.decode import Decoded, DecodeMode, ImageRejected
from siglip.images.decoder import DecoderRing
from storage.schemes import open_store
from storage.store import StoreError

YIELD_BYTES = 8 * 2**20
AHEAD, AHEAD_BYTES = 8, 8 * 2**20
"""Rows that are read before a decoder is done with the first of them, for each decoder."""


@dataclass(frozen=True)
class ReaderConfig:
    """What a reader needs beside the shard: everything small, and the same for all shards.

    A shard has `decoders` processes that decode, or one for each `rows_per_decoder` rows if those are more, as far as
    the machine has cores: one large tar is read by one task, and decoded by as many as are its share of the job.
    `retry` are the reasons of the rejects that a shard of a later generation takes up again; none for all.
    """

    output: str
    reading: Reading
    spec: ImageSpec
    limits: Limits
    mode: DecodeMode
    thumbnail: int | None
    retry: frozenset[str] = frozenset()
    decoders: int = 1
    rows_per_decoder: int = 2**31

    def count_decoders(self, rows: int) -> int:
        """Decoder processes for a shard of about so many rows, on the machine that this is."""
        return max(self.decoders, min(count_cores(), round(rows / self.rows_per_decoder)))

    def block_schema(self) -> pa.Schema:
        """A block's columns on the way from the reader to the actor."""
        fields = [
            ("shard", pa.string()),
            ("row", pa.int64()),
            ("ending", pa.string()),
            ("key", pa.string()),
            ("source", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("sha256", pa.string()),
            ("metadata", pa.string()),
            ("thumbnail", pa.binary()),
            ("stage", pa.string()),
            ("reason", pa.string()),
            ("detail", pa.string()),
            ("read_s", pa.float32()),
            ("decode_s", pa.float32()),
            ("ready_at", pa.float64()),
            ("pixels", pa.large_binary()),
        ]
        passed = [field.with_name(COLUMN_PREFIX + field.name) for field in self.reading.columns]
        return pa.schema([*fields, *passed])


def read_shard(refs: pa.Table, config: ReaderConfig) -> Iterator[pa.Table]:
    """Read and decode the shards of a block (one, as the job makes them), a table of a few MB at a time.

    What the store cannot give now ends its shard with a marker that says so, and harms no other.
    """
    prefer_throughput()
    for record in refs.to_pylist():
        yield from _read_one(ShardRef(**record), config)


def prepare_reader(config: ReaderConfig) -> None:
    """Have this worker's decoders before there is a shard for them. Returns when they are ready."""
    prefer_throughput()
    ring = _decoder_ring(config.spec, config.limits, config.mode, config.thumbnail)
    ring.resize(config.decoders)
    ring.wait()


def _read_one(ref: ShardRef, config: ReaderConfig) -> Iterator[pa.Table]:
    schema, shard = config.block_schema(), shard_name(ref.shard, ref.generation)
    per_table = max(1, YIELD_BYTES // (3 * config.spec.size**2))
    store = open_store(config.output, config.reading.store)
    # The plan and the commits are the output's own: trouble with them is the run's, not the shard's.
    inputs = list(read_shard_inputs(store, ref))
    numbers: list[int] = []
    lost = 0
    skipped = Skipped()
    rows_in: Callable[[], int]
    rows: Iterator[tuple[int, Row]]
    if ref.generation:
        retry = find_retry(store, config.output, ref, config.retry)
        rows, rows_in = read_retried(inputs, retry, config.reading, skipped), lambda: retry.rows_in
    else:
        rows, rows_in = _number(inputs, config.reading, skipped), lambda: len(numbers)
    block = _Block(schema, per_table, config.spec.size)
    try:
        for number, row, line in _decode(rows, config, block, config.count_decoders(ref.rows)):
            numbers.append(number)
            lost += row.lost
            block.lines.append({"shard": shard, "row": number, "ready_at": time.time(), **line})
            if len(block.lines) == per_table:
                yield block.flush()
        runs = encode_rows(np.asarray(numbers, np.int64))
        ending = Ending(runs, rows_in(), dict(skipped.counts), lost)
    except StoreError as error:
        ending = Ending(wait=wait_reason(error), detail=str(error))
    block.lines.append({"shard": shard, "row": MARKER, "ending": ending.to_json()})
    yield block.flush()


def _number(inputs: list[Input], reading: Reading, skipped: Skipped) -> Iterator[tuple[int, Row]]:
    for number, (_, row) in enumerate(read_inputs(inputs, reading, skipped)):
        yield number, row


class _Block:
    """Rows on their way into a table, and the pixels of those that have some: one after another, where they stay."""

    def __init__(self, schema: pa.Schema, rows: int, size: int) -> None:
        self._schema = schema
        self._shape = (rows, size, size, 3)
        self._images = np.empty(self._shape, np.uint8)
        self._filled = 0
        self.lines: list[dict[str, Any]] = []

    def take(self, ring: DecoderRing) -> Decoded | ImageRejected:
        """The ring's oldest image, its pixels behind those that are here."""
        outcome = ring.take(self._images[self._filled])
        self._filled += isinstance(outcome, Decoded)
        return outcome

    def flush(self) -> pa.Table:
        """The rows as a table, and room for as many again."""
        columns = {column.name: self._column(column) for column in self._schema}
        self.lines, self._images, self._filled = [], np.empty(self._shape, np.uint8), 0
        return pa.table(columns, schema=self._schema)

    def _column(self, column: pa.Field) -> pa.Array:
        if column.name == "pixels":
            return self._pixels()
        values = [line.get(column.name) for line in self.lines]
        if column.name.startswith(COLUMN_PREFIX):
            nothing = pa.nulls(1, column.type)
            return pa.concat_arrays([nothing if value is None else value for value in values])
        return pa.array(values, column.type)

    def _pixels(self) -> pa.Array:
        """A null takes no bytes: so rejected rows leave no holes, and the images of a table are one array."""
        has = np.fromiter(("width" in line for line in self.lines), bool, len(self.lines))
        ends = np.cumsum(has) * int(np.prod(self._shape[1:]))
        offsets = pa.py_buffer(np.concatenate([[0], ends]).astype(np.int64))
        valid = pa.py_buffer(np.packbits(has, bitorder="little"))
        return pa.Array.from_buffers(
            pa.large_binary(), len(has), [valid, offsets, pa.py_buffer(self._images[: self._filled])]
        )


def _decode(
    rows: Iterator[tuple[int, Row]], config: ReaderConfig, block: _Block, decoders: int
) -> Iterator[tuple[int, Row, dict[str, Any]]]:
    """Rows with what they became, their pixels in the block. While decoders work on some, the next are read."""
    ring = _decoder_ring(config.spec, config.limits, config.mode, config.thumbnail)
    ring.resize(decoders)
    ahead: deque[tuple[int, Row, float]] = deque()
    size = 0
    more = True
    while ahead or more:
        while more and (not ahead or (len(ahead) < decoders * AHEAD and size < decoders * AHEAD_BYTES)):
            start = time.perf_counter()
            number, row = next(rows, (MARKER, None))
            if row is None:
                more = False
                break
            ahead.append((number, row, time.perf_counter() - start))
            if row.data is not None:
                size += len(row.data)
                ring.submit(row.data)
        if not ahead:
            return
        number, row, seconds = ahead.popleft()
        yield number, row, _take(ring, block, row, seconds)
        size -= len(row.data or b"")


def _take(ring: DecoderRing, block: _Block, row: Row, read_s: float) -> dict[str, Any]:
    """A row's columns: what was read, and what the decoder made of it."""
    line: dict[str, Any] = {
        "key": row.key,
        "source": row.source,
        "metadata": row.metadata,
        "sha256": None if row.data is None else hashlib.sha256(row.data).hexdigest(),
        "read_s": read_s,
        "decode_s": 0.0,
        **{COLUMN_PREFIX + name: value for name, value in row.columns.items()},
    }
    outcome = row.rejected if row.data is None else block.take(ring)
    if isinstance(outcome, Decoded):
        line |= {"width": outcome.width, "height": outcome.height, "thumbnail": outcome.thumbnail}
        line["decode_s"] = outcome.seconds
    else:
        rejected = outcome or ImageRejected("missing")
        line |= {"reason": rejected.reason, "detail": rejected.detail}
        line["stage"] = "read" if row.data is None else "decode"
    return line


@cache
def _decoder_ring(spec: ImageSpec, limits: Limits, mode: DecodeMode, thumbnail: int | None) -> DecoderRing:
    """This worker's decoders: their child processes serve one shard after another."""
    return DecoderRing(spec, limits, mode, thumbnail)
