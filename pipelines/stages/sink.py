"""The sink: writes blocks of rows to part files, and returns a receipt for each part."""

from __future__ import annotations

import time

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.output.writer import OutputWriter
from pipelines.stages.parts import SUMMARY_ROW, encode_rows

RECEIPT_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("part", pa.string()),
        ("rows", pa.list_(pa.int64())),
        ("summary", pa.string()),
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
"""The columns of a receipt, which tells the driver what was written for a shard.

`part` is the part's URI and `rows` the runs of its rows; `part` is null if the block has only the shard's summary.
`summary` is a `pipelines.stages.parts.ShardSummary`, in the receipt for a shard's last row. `actors` names the actors
that computed the rows, the `_s` columns are seconds of work, and `started_at` is when the first image was decoded.
"""


def write_parts(block: pa.Table, writer: OutputWriter) -> pa.Table:
    """Write one part for each shard in a block. Return a table with a receipt for each part."""
    receipts = []
    for shard in pc.unique(block["shard"]).to_pylist():
        rows = block.filter(pc.equal(block["shard"], shard))
        summary = rows.filter(pc.equal(rows["row"], SUMMARY_ROW))
        rows = rows.filter(pc.greater(rows["row"], SUMMARY_ROW))
        start = time.perf_counter()
        part = writer.write_part(shard, rows) if rows.num_rows else None
        rejected = pc.count(rows["reason"]).as_py()
        receipts.append(
            {
                "shard": shard,
                "part": part,
                "rows": encode_rows(rows["row"].to_numpy()),
                "summary": summary["summary"][0].as_py() if summary.num_rows else None,
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
