"""The stages that Ray Data runs: read and decode, tag, sink. Each takes and gives Arrow tables.

A shard's rows travel as blocks of one schema. Pixels are a binary column, empty for a rejected row, so that a
rejected row costs the model nothing. The last row of every shard is a marker without an image: it says how many rows
the shard has, which for a tar is known only at its end.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.plan import ShardRef, read_shard_inputs
from pipelines.shards import PartWriter, encode_rows
from pipelines.sources import Input, Reading, Row, read_images, read_input
from siglip.actor import SiglipActor, tag_embeddings
from siglip.config import ImageSpec, Limits, ModelConfig
from siglip.decoder import Decoder
from siglip.images import Decoded, DecodeMode, ImageRejected
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale
from storage.store import open_store

BLOCK_BYTES = 64 * 2**20
"""Ray Data's target block: 341 images of 256 x 256. Smaller blocks cost overhead, larger ones delay receipts."""
YIELD_BYTES = 8 * 2**20
DECODED_TOGETHER, DECODED_BYTES = 8, 8 * 2**20
MARKER = -1
"""The `row` of a shard's last line, which holds its row count in `rows_in` and no image."""


@dataclass(frozen=True)
class Decoding:
    """What a reader needs beside the shard: everything small, and the same for all shards."""

    reading: Reading
    spec: ImageSpec
    limits: Limits
    mode: DecodeMode
    thumbnail: int | None
    columns: pa.Schema

    def block_schema(self) -> pa.Schema:
        """A block's columns on the way from the reader to the actor."""
        fields = [
            ("shard", pa.string()),
            ("row", pa.int64()),
            ("rows_in", pa.int64()),
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
        return pa.schema([*fields, *self.columns])


def read_shard(refs: pa.Table, decoding: Decoding) -> Iterator[pa.Table]:
    """Read and decode the shards of a block (one, as the job makes them), a table of a few MB at a time."""
    schema = decoding.block_schema()
    per_table = max(1, YIELD_BYTES // (3 * decoding.spec.size**2))
    for record in refs.to_pylist():
        ref = ShardRef(**record)
        pending: list[dict[str, Any]] = []
        number = -1
        for number, line in enumerate(_decode_rows(ref, decoding)):
            pending.append({"shard": ref.shard, "row": number, "ready_at": time.time(), **line})
            if len(pending) == per_table:
                yield _to_block(pending, schema)
                pending = []
        pending.append({"shard": ref.shard, "row": MARKER, "rows_in": number + 1})
        yield _to_block(pending, schema)


def _to_block(lines: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.table({f.name: pa.array([line.get(f.name) for line in lines], f.type) for f in schema}, schema=schema)


def _decode_rows(ref: ShardRef, decoding: Decoding) -> Iterator[dict[str, Any]]:
    decoder = _decoder(decoding.spec, decoding.limits, decoding.mode, decoding.thumbnail)
    rows = _read_rows(ref, decoding.reading)
    while True:
        start = time.perf_counter()
        group = list(_take_group(rows))
        if not group:
            return
        read = time.perf_counter()
        outcomes = iter(decoder.decode([row.data for row in group if row.data is not None]))
        done = time.perf_counter()
        for row in group:
            line = {
                "key": row.key,
                "source": row.source,
                "metadata": row.metadata,
                "sha256": None if row.data is None else hashlib.sha256(row.data).hexdigest(),
                "read_s": (read - start) / len(group),
                "decode_s": (done - read) / len(group),
                **row.columns,
            }
            outcome = row.rejected if row.data is None else next(outcomes)
            if isinstance(outcome, Decoded):
                line |= {"width": outcome.width, "height": outcome.height, "thumbnail": outcome.thumbnail}
                line["pixels"] = outcome.pixels.data.cast("B")
            else:
                rejected = outcome or ImageRejected("missing")
                line |= {"reason": rejected.reason, "detail": rejected.detail}
                line["stage"] = "read" if row.data is None else "decode"
            yield line


def _take_group(rows: Iterator[Row]) -> Iterator[Row]:
    """The next few rows: what the decoder is handed at once."""
    size = 0
    for row in islice(rows, DECODED_TOGETHER):
        size += len(row.data or b"")
        yield row
        if size >= DECODED_BYTES:
            return


@cache
def _decoder(spec: ImageSpec, limits: Limits, mode: DecodeMode, thumbnail: int | None) -> Decoder:
    """This worker's decoder: its child process serves one shard after another."""
    return Decoder(spec, limits, mode, thumbnail)


def _read_rows(ref: ShardRef, reading: Reading) -> Iterator[Row]:
    """All rows of a shard. Neighbouring loose images are fetched together, a few ahead."""
    loose: list[Input] = []
    for planned in read_shard_inputs(open_store(ref.segment, reading.store), ref):
        if planned.kind in ("image", "uri"):
            loose.append(planned)
            continue
        yield from read_images(loose, reading)
        loose = []
        yield from read_input(planned, reading)
    yield from read_images(loose, reading)


@dataclass(frozen=True)
class Tagging:
    """What an actor needs: the model's config and the label set with its embeddings (L, D)."""

    model: ModelConfig
    labels: LabelSet
    texts: Floats
    scale: Scale


class Tag:
    """The actor pool's class: `SiglipActor` on Arrow tables. Pixels end here."""

    def __init__(self, tagging: Tagging, threads: int) -> None:
        self.tagging = tagging
        self.actor = SiglipActor(tagging.model, threads)
        about = self.actor.describe()
        self.name = (
            f"{about['device']} {about['dtype']}{' compiled' if about['compiled'] else ''} {uuid.uuid4().hex[:8]}"
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        started = time.time()
        valid = pc.is_valid(block["pixels"])
        images = block.filter(valid) if block["pixels"].null_count else block
        before = self.actor.model_seconds
        embeddings = self.actor.embed(pixels_of(images["pixels"], self.actor.encoder.spec.size))
        seconds = self.actor.model_seconds - before
        tagged = tag_embeddings(embeddings, self.tagging.labels, self.tagging.texts, self.tagging.scale)
        where = np.flatnonzero(valid.to_numpy())
        labels: list[list[str] | None] = [None] * block.num_rows
        scores: list[Any] = [None] * block.num_rows
        vectors = np.zeros((block.num_rows, self.actor.encoder.width), np.float32)
        vectors[where] = embeddings
        for position, row_labels, row_scores in zip(where, tagged["labels"], tagged["scores"], strict=True):
            labels[position], scores[position] = row_labels, row_scores
        count = max(1, images.num_rows)
        added = {
            "labels": pa.array(labels, pa.list_(pa.string())),
            "scores": pa.array(scores, pa.list_(pa.float32())),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self.actor.encoder.width),
            "queue_s": pc.cast(pc.subtract(started, block["ready_at"]), pa.float32()),
            "model_s": pa.array(np.where(valid.to_numpy(), seconds / count, 0), pa.float32()),
            "actor": pa.array([self.name] * block.num_rows, pa.string()),
        }
        block = block.drop_columns(["pixels"])
        for name, column in added.items():
            block = block.append_column(name, column)
        return block


def pixels_of(column: pa.ChunkedArray, size: int) -> np.ndarray:
    """A binary column of images to uint8 (N, S, S, 3), without copying where it is one chunk."""
    chunks = []
    for chunk in column.chunks:
        if len(chunk):
            offsets = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            chunks.append(np.frombuffer(chunk.buffers()[2], np.uint8)[offsets[0] : offsets[-1]])
    flat = chunks[0] if len(chunks) == 1 else np.concatenate([*chunks, np.zeros(0, np.uint8)])
    return flat.reshape(-1, size, size, 3)


def write_parts(block: pa.Table, writer: PartWriter) -> pa.Table:
    """The sink: a block's rows to one part file for each shard in it, and a receipt for each part."""
    receipts = []
    for shard in pc.unique(block["shard"]).to_pylist():
        rows = block.filter(pc.equal(block["shard"], shard))
        marker = rows.filter(pc.equal(rows["row"], MARKER))
        rows = rows.filter(pc.greater(rows["row"], MARKER))
        start = time.perf_counter()
        part = writer.write(shard, rows) if rows.num_rows else None
        receipts.append(
            {
                "shard": shard,
                "part": part,
                "rows": encode_rows(rows["row"].to_numpy()),
                "rows_in": marker["rows_in"][0].as_py() if marker.num_rows else None,
                "tagged": rows.num_rows - pc.count(rows["reason"]).as_py(),
                "rejected": pc.count(rows["reason"]).as_py(),
                "actors": pc.unique(rows["actor"]).to_pylist(),
                **{
                    f"{name}_s": pc.sum(rows[f"{name}_s"]).as_py() or 0.0
                    for name in ("read", "decode", "queue", "model")
                },
                "started_at": pc.min(rows["ready_at"]).as_py(),
                "write_s": time.perf_counter() - start,
            }
        )
    return pa.Table.from_pylist(receipts, schema=RECEIPT_SCHEMA)


RECEIPT_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("part", pa.string()),
        ("rows", pa.list_(pa.int64())),
        ("rows_in", pa.int64()),
        ("tagged", pa.int64()),
        ("rejected", pa.int64()),
        ("actors", pa.list_(pa.string())),
        ("read_s", pa.float64()),
        ("decode_s", pa.float64()),
        ("queue_s", pa.float64()),
        ("model_s", pa.float64()),
        ("write_s", pa.float64()),
        ("started_at", pa.float64()),
    ]
)
