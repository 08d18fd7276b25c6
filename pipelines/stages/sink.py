"""The last stage: blocks of rows to part files, and a receipt for each part."""

from __future__ import annotations

import time

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.output.parts import MARKER, PartWriter, encode_rows

RECEIPT_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("part", pa.string()),
        ("rows", pa.list_(pa.int64())),
        ("ending", pa.string()),
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


def write_parts(block: pa.Table, writer: PartWriter) -> pa.Table:
    """The sink: a block's rows to one part file for each shard in it, and a receipt for each part."""
    receipts = []
    for shard in pc.unique(block["shard"]).to_pylist():
        rows = block.filter(pc.equal(block["shard"], shard))
        marker = rows.filter(pc.equal(rows["row"], MARKER))
        rows = rows.filter(pc.greater(rows["row"], MARKER))
        start = time.perf_counter()
        part = writer.write(shard, rows) if rows.num_rows else None
        rejected = pc.count(rows["reason"]).as_py()
        receipts.append(
            {
                "shard": shard,
                "part": part,
                "rows": encode_rows(rows["row"].to_numpy()),
                "ending": marker["ending"][0].as_py() if marker.num_rows else None,
                "tagged": rows.num_rows - rejected,
                "rejected": rejected,
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
