"""The reader: the stage that reads, decodes and numbers a shard's images, and returns them as Arrow blocks.

All blocks have the schema `pipelines.output.schema.OutputFormat.block_schema`. The column `pixels` is null for rejected
rows, so that they cost the model nothing. The last row of every shard has no image. It holds the shard's summary: for
example the number of rows, which for a tar is known only at its end.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.cluster import RETRIES
from pipelines.inputs.formats import read_inputs
from pipelines.inputs.rows import Input, InputError, Reading, Row, Skipped, WaitReason, wait_reason
from pipelines.output.output import Output
from pipelines.output.schema import COLUMN_PREFIX, OutputFormat
from pipelines.planning.plan import ShardRef, read_inputs_of
from pipelines.ray_internals import count_retries
from pipelines.stages.parts import SUMMARY_ROW, ShardSummary, encode_rows
from pipelines.upkeep.retry import find_retry, read_retried
from siglip.config import ImageSpec, Limits, count_cores, prefer_throughput
from siglip.images.decode import Decoded, DecodeMode, ImageRejected
from siglip.images.decoder import DecoderRing
from storage.settings import ConfigError
from storage.store import StoreError

logger = logging.getLogger(__name__)

BLOCK_PIXEL_BYTES = 8 * 2**20
"""A block that a reader returns has about this many bytes of pixels. Ray Data joins blocks up to its target size."""
AHEAD, AHEAD_BYTES = 8, 8 * 2**20
"""For each decoder, the most rows and encoded bytes that are read ahead while it decodes an earlier image."""


@dataclass(frozen=True)
class ReaderConfig:
    """The configuration of a reader: small, picklable, and the same for all shards of a run.

    `spec` and `mode` say how to resize and decode images, `thumbnail` is the longer side of thumbnails or None. A shard
    has `decoders` decoder processes, or one for each `rows_per_decoder` rows if that is more, up to the number of
    cores. So a large tar, which one task reads, is decoded by as many processes as its share of the job. `retry` are
    the reasons of the rejected rows that a shard of a later generation retries; if empty, all rejected rows. No shard
    is begun after `deadline`, a Unix time.
    """

    output: Output
    format: OutputFormat
    reading: Reading
    spec: ImageSpec
    limits: Limits
    mode: DecodeMode
    thumbnail: int | None
    retry: frozenset[str] = frozenset()
    decoders: int = 1
    rows_per_decoder: int = 2**31
    deadline: float | None = None

    def count_decoders(self, rows: int) -> int:
        """Return the number of decoder processes for a shard of about `rows` rows on this machine."""
        return max(self.decoders, min(count_cores(), round(rows / self.rows_per_decoder)))


def read_shard(block: pa.Table, config: ReaderConfig) -> Iterator[pa.Table]:
    """Read and decode the shards of a block, whose column `refs` has lists of `ShardRef` records.

    Yields tables of a few MB. If the store cannot deliver a shard's input now, that shard ends with a summary that says
    so; other shards are not affected. Neither are they if reading a shard raises another exception, or ends the process
    at each attempt: when a block with several shards has ended it twice, nothing more is yielded, and the job gives
    each of these shards a block of its own.
    """
    prefer_throughput()
    wanted = [ShardRef(**record) for records in block["refs"].to_pylist() for record in records]
    if len(wanted) > 1 and count_retries() > 1:
        yield config.format.block_schema().empty_table()
        return
    # A plan or a commit record that cannot be read ends the run, and not only its shard.
    for ref, inputs in read_inputs_of(config.output, wanted):
        yield from _read_one(ref, inputs, config)


def prepare_reader(config: ReaderConfig) -> None:
    """Start this worker's decoder processes before a shard needs them. Returns when they are ready."""
    prefer_throughput()
    ring = _decoder_ring(config.spec, config.limits, config.mode, config.thumbnail)
    ring.resize(config.decoders)
    ring.wait()


def _read_one(ref: ShardRef, inputs: list[Input], config: ReaderConfig) -> Iterator[pa.Table]:
    schema = config.format.block_schema()
    per_table = max(1, BLOCK_PIXEL_BYTES // config.spec.bytes)

    def summary_line(summary: ShardSummary) -> dict[str, Any]:
        return {"shard": ref.name, "row": SUMMARY_ROW, "summary": summary.to_json()}

    def wait(reason: WaitReason, detail: str) -> pa.Table:
        # A new block: the one that is being filled may hold the value that raised. Its rows are not committed anyway.
        return _Block(schema, 1, config.spec.shape).flush(summary_line(ShardSummary(wait=reason, detail=detail)))

    if config.deadline is not None and time.time() >= config.deadline:
        yield wait("stopped", "the time that --for gives was over")
        return
    if count_retries() >= RETRIES:  # if this attempt died too, Ray would end the whole run
        yield wait("error", describe_death(inputs))
        return
    numbers: list[int] = []
    lost = 0
    skipped = Skipped()
    trouble = Counter[str]()
    reading = replace(config.reading, last=ref.generation + 1 >= config.reading.fetch.runs)
    rows_in: Callable[[], int]
    rows: Iterator[tuple[int, Row]]
    if ref.generation:
        retry = find_retry(config.output, ref, config.retry)
        rows, rows_in = read_retried(inputs, retry, reading, skipped), lambda: retry.rows_in
    else:
        rows, rows_in = _number(inputs, reading, skipped), lambda: len(numbers)
    block = _Block(schema, per_table, config.spec.shape)

    try:
        for number, row, line in _decode(rows, config, block, config.count_decoders(ref.rows)):
            numbers.append(number)
            lost += row.lost
            if row.trouble:
                trouble[row.trouble] += 1
            block.add({"shard": ref.name, "row": number, "ready_at": time.time(), **line})
            if block.is_full():
                yield block.flush()
        runs = encode_rows(np.asarray(numbers, np.int64))
        summary = ShardSummary(runs, rows_in(), dict(skipped.counts), lost, trouble=dict(trouble))
        yield block.flush(summary_line(summary))
        return
    except StoreError as error:
        yield wait(wait_reason(error), str(error))
    except Exception as error:  # one input that reveals a fault in this code must not stop the other shards
        logger.exception("shard %s", ref.shard)
        known = isinstance(error, (ConfigError, InputError))
        yield wait("error", str(error) if known else f"{type(error).__name__}: {error}")


def describe_death(inputs: list[Input]) -> str:
    """Return the message about a shard whose reader died at every attempt. It names the first of the inputs."""
    more = f" or one of {len(inputs) - 1:,} more inputs" if len(inputs) > 1 else ""
    return f"the process that read this shard died at {RETRIES} attempts: {inputs[0].uri}{more} ends it"


def _number(inputs: list[Input], reading: Reading, skipped: Skipped) -> Iterator[tuple[int, Row]]:
    for _, row in read_inputs(inputs, reading, skipped):
        yield row.number, row


class _Block:
    """A table being filled: its rows as dictionaries, and one array for the pixels of all its images."""

    def __init__(self, schema: pa.Schema, rows: int, shape: tuple[int, ...]) -> None:
        self._schema = schema
        self._shape = (rows, *shape)
        self._images = np.empty(self._shape, np.uint8)
        self._filled = 0
        self._other_bytes = 0
        self._last: Decoded | ImageRejected = ImageRejected("missing")
        self.lines: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> None:
        """Append a row, whose pixels, if it has any, were taken before."""
        self.lines.append(line)
        self._other_bytes += sum(_count_bytes(value) for value in line.values())

    def is_full(self) -> bool:
        """Tell whether the block has its number of rows, or as many bytes besides the pixels as a block has pixels.

        A row's metadata, thumbnail and passed-through columns may be larger than its pixels.
        """
        return len(self.lines) >= self._shape[0] or self._other_bytes >= BLOCK_PIXEL_BYTES

    def take(self, ring: DecoderRing) -> Decoded | ImageRejected:
        """Take the oldest image from the ring. Its pixels are appended to the block's."""
        self._last = outcome = ring.take(self._images[self._filled])
        self._filled += isinstance(outcome, Decoded)
        return outcome

    def repeat(self) -> Decoded | ImageRejected:
        """Append the pixels of the image that was taken last once more."""
        if isinstance(self._last, Decoded):
            self._images[self._filled] = self._last.pixels
            self._filled += 1
            return replace(self._last, seconds=0.0)
        return self._last

    def flush(self, *last: dict[str, Any]) -> pa.Table:
        """Return the rows and the lines `last` as a table, and start a new block."""
        self.lines += last
        columns = {column.name: self._column(column) for column in self._schema}
        self.lines, self._images, self._filled, self._other_bytes = [], np.empty(self._shape, np.uint8), 0, 0
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
        """Return the pixels as a binary column. Nulls take no bytes, so all images are one contiguous array."""
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
    """Yield rows with their columns; the pixels go to `block`. Reads the next rows while decoders work."""
    ring = _decoder_ring(config.spec, config.limits, config.mode, config.thumbnail)
    ring.resize(decoders)
    ahead: deque[tuple[int, Row, float, bool]] = deque()
    size = 0
    submitted: bytes | None = None
    more = True
    while ahead or more:
        while more and (not ahead or (len(ahead) < decoders * AHEAD and size < decoders * AHEAD_BYTES)):
            start = time.perf_counter()
            number, row = next(rows, (SUMMARY_ROW, None))
            if row is None:
                more = False
                break
            # Consecutive rows may be of one image, which is fetched and decoded once: a list with several captions.
            again = row.data is not None and row.data is submitted
            ahead.append((number, row, time.perf_counter() - start, again))
            size += len(row.data or b"")
            if row.data is not None and not again:
                submitted = row.data
                ring.submit(row.data)
        if not ahead:
            return
        number, row, seconds, again = ahead.popleft()
        yield number, row, _describe_row(row, seconds, _take(ring, block, row, again))
        size -= len(row.data or b"")


def _take(ring: DecoderRing, block: _Block, row: Row, again: bool) -> Decoded | ImageRejected:
    """Return the decoder's result for a row, or the reason why it was not decoded."""
    if row.data is None:
        return row.rejected or ImageRejected("missing")
    return block.repeat() if again else block.take(ring)


def _describe_row(row: Row, read_s: float, outcome: Decoded | ImageRejected) -> dict[str, Any]:
    """Return the columns of a row, from what was read and from the decoder's result."""
    line: dict[str, Any] = {
        "key": row.key,
        "source": row.source,
        "metadata": row.metadata,
        "sha256": row.sha256,
        "read_s": read_s,
        "decode_s": 0.0,
        **{COLUMN_PREFIX + name: value for name, value in row.columns.items()},
    }
    if isinstance(outcome, Decoded):
        line |= {"width": outcome.width, "height": outcome.height, "thumbnail": outcome.thumbnail}
        line["decode_s"] = outcome.seconds
    else:
        note = f" ({row.note})" if row.note else ""
        line |= {"reason": outcome.reason, "detail": f"{outcome.detail}{note}".strip()}
        line["stage"] = "read" if row.data is None else "decode"
    return line


def _count_bytes(value: object) -> int:
    """Return the bytes of a text, of a binary value or of an Arrow array, and 0 for numbers and nothing."""
    return value.nbytes if isinstance(value, pa.Array) else len(value) if isinstance(value, (str, bytes)) else 0


@cache
def _decoder_ring(spec: ImageSpec, limits: Limits, mode: DecodeMode, thumbnail: int | None) -> DecoderRing:
    """Return this worker's decoder processes, which are kept from one shard to the next."""
    return DecoderRing(spec, limits, mode, thumbnail)
