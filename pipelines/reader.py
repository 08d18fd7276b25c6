"""The first stage: a shard's images, read, decoded and numbered, as blocks of Arrow.

A shard's rows travel as blocks of one schema. Pixels are a binary column, empty for a rejected row, so that a
rejected row costs the model nothing. The last row of every shard is a marker without an image: it says how the reading
ended, and how many rows the shard has, which for a tar is known only at its end.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.formats import read_inputs
from pipelines.output import COLUMN_PREFIX, shard_name
from pipelines.parts import MARKER, Ending, encode_rows
from pipelines.plan import ShardRef, read_shard_inputs
from pipelines.retry import find_retry, read_retried
from pipelines.rows import Input, Reading, Row, Skipped, wait_reason
from siglip.config import ImageSpec, Limits
from siglip.decoder import Decoder
from siglip.images import Decoded, DecodeMode, ImageRejected
from storage.store import StoreError, open_store

BLOCK_BYTES = 64 * 2**20
"""Ray Data's target block: 341 images of 256 x 256. Smaller blocks cost overhead, larger ones delay receipts."""
YIELD_BYTES = 8 * 2**20
DECODED_TOGETHER, DECODED_BYTES = 8, 8 * 2**20


@dataclass(frozen=True)
class ReaderConfig:
    """What a reader needs beside the shard: everything small, and the same for all shards.

    `retry` are the reasons of the rejects that a shard of a later generation takes up again; none for all.
    """

    output: str
    reading: Reading
    spec: ImageSpec
    limits: Limits
    mode: DecodeMode
    thumbnail: int | None
    retry: frozenset[str] = frozenset()

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
    for record in refs.to_pylist():
        yield from _read_one(ShardRef(**record), config)


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
    pending: list[dict[str, Any]] = []
    try:
        for number, row, line in _decode(rows, config):
            numbers.append(number)
            lost += row.lost
            pending.append({"shard": shard, "row": number, "ready_at": time.time(), **line})
            if len(pending) == per_table:
                yield _to_block(pending, schema)
                pending = []
        runs = encode_rows(np.asarray(numbers, np.int64))
        ending = Ending(runs, rows_in(), dict(skipped.counts), lost)
    except StoreError as error:
        ending = Ending(wait=wait_reason(error), detail=str(error))
    pending.append({"shard": shard, "row": MARKER, "ending": ending.to_json()})
    yield _to_block(pending, schema)


def _number(inputs: list[Input], reading: Reading, skipped: Skipped) -> Iterator[tuple[int, Row]]:
    for number, (_, row) in enumerate(read_inputs(inputs, reading, skipped)):
        yield number, row


def _to_block(lines: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    columns = {}
    for column in schema:
        values = [line.get(column.name) for line in lines]
        if column.name.startswith(COLUMN_PREFIX):
            nothing = pa.nulls(1, column.type)
            columns[column.name] = pa.concat_arrays([nothing if value is None else value for value in values])
        else:
            columns[column.name] = pa.array(values, column.type)
    return pa.table(columns, schema=schema)


def _decode(rows: Iterator[tuple[int, Row]], config: ReaderConfig) -> Iterator[tuple[int, Row, dict[str, Any]]]:
    decoder = _decoder(config.spec, config.limits, config.mode, config.thumbnail)
    while True:
        start = time.perf_counter()
        group = list(_take_group(rows))
        if not group:
            return
        read = time.perf_counter()
        outcomes = iter(decoder.decode([row.data for _, row in group if row.data is not None]))
        done = time.perf_counter()
        for number, row in group:
            line = {
                "key": row.key,
                "source": row.source,
                "metadata": row.metadata,
                "sha256": None if row.data is None else hashlib.sha256(row.data).hexdigest(),
                "read_s": (read - start) / len(group),
                "decode_s": (done - read) / len(group),
                **{COLUMN_PREFIX + name: value for name, value in row.columns.items()},
            }
            outcome = row.rejected if row.data is None else next(outcomes)
            if isinstance(outcome, Decoded):
                line |= {"width": outcome.width, "height": outcome.height, "thumbnail": outcome.thumbnail}
                line["pixels"] = outcome.pixels.data.cast("B")
            else:
                rejected = outcome or ImageRejected("missing")
                line |= {"reason": rejected.reason, "detail": rejected.detail}
                line["stage"] = "read" if row.data is None else "decode"
            yield number, row, line


def _take_group(rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    """The next few rows: what the decoder is handed at once."""
    size = 0
    for number, row in islice(rows, DECODED_TOGETHER):
        size += len(row.data or b"")
        yield number, row
        if size >= DECODED_BYTES:
            return


@cache
def _decoder(spec: ImageSpec, limits: Limits, mode: DecodeMode, thumbnail: int | None) -> Decoder:
    """This worker's decoder: its child process serves one shard after another."""
    return Decoder(spec, limits, mode, thumbnail)
