"""Committing a shard: from its parts to its files and its commit record. Knows no Ray.

A commit reads the shard's parts, keeps each row once, writes the final files, and only then writes the commit record. A
shard without a record is not committed, and its files are ignored. Every step may be repeated, by a replayed task or by
another run at the same time: the first record is kept, and the later ones delete their own files.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.output.label_columns import count_labels, count_values
from pipelines.output.ledger import Ledger
from pipelines.output.output import Output, commit_path
from pipelines.output.row_files import RowFile, load_files, read_rows
from pipelines.output.schema import COLUMN_PREFIX
from pipelines.output.writer import OutputWriter
from pipelines.planning.plan import ShardRef
from pipelines.stages.parts import ShardSummary, decode_rows, read_parts
from storage.store import NotFound


def commit_shard(
    writer: OutputWriter, ref: ShardRef, parts: Mapping[str, Sequence[int]], summary: ShardSummary
) -> dict[str, Any]:
    """Write a complete shard's files and its commit record, delete its parts, and return the record that is stored.

    `parts` are the URIs of the parts that the shard's receipts name, each with the runs of its rows. Memory holds one
    row group of tagged rows at a time, however large the shard is.

    If the shard is already committed, by another run or by this task before its process died, that record is kept. In a
    later generation, the rows in the parts replace reject rows of the generation before. Raises `RuntimeError` if the
    parts do not hold every row.
    """
    output = writer.output
    record = _find_commit(output, ref)
    if record is None:
        try:
            record = _write_commit(writer, ref, read_parts(output.store, parts), summary)
        except NotFound:
            # Another run has finished meanwhile, and deleted the parts of all committed shards.
            record = _find_commit(output, ref)
            if record is None:
                current = with_current_files(output, ref)
                if current is None:
                    raise
                record = _write_commit(writer, current, read_parts(output.store, parts), summary)
    for part in parts:
        output.store.delete(part)
    return record


def with_current_files(output: Output, ref: ShardRef) -> ShardRef | None:
    """Return a shard that is retried with the files that it has now, if a compaction has merged them meanwhile.

    Returns None if it has the files of `ref`, or if another run has retried it.
    """
    ledger = Ledger.read(output)
    if not ref.generation or ledger.generation_of(ref.shard) != ref.generation - 1:
        return None
    current = ledger.with_files([ref])[0]
    return None if current == ref else current


def put_commit(
    writer: OutputWriter,
    ref: ShardRef,
    rows_in: int,
    written: Sequence[dict[str, Any]],
    counts: dict[str, dict[str, int]],
    kept: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Write a shard's commit record, once all its files are written. Return the stored record.

    `written` are the entries of the files that this commit wrote; if another record is already stored, these files are
    deleted. `kept` are the entries of files of an earlier generation that stay valid. `counts` holds the record's
    `reasons`, `labels` and `skipped`. Raises `RuntimeError` if tagged and rejected rows do not add up to `rows_in`.
    """
    files = [*kept, *written]
    tagged, rejected = (_count_rows(files, kind) for kind in ("data/", "rejects/"))
    record = {
        "shard": ref.shard,
        "generation": ref.generation,
        "rows_in": rows_in,
        "rows_tagged": tagged,
        "rows_rejected": rejected,
        **counts,
        "files": files,
        "fingerprint": hashlib.sha256(writer.fingerprint.encode()).hexdigest(),
    }
    if tagged + rejected != rows_in:
        raise RuntimeError(f"shard {ref.shard} would lose rows: {tagged} tagged and {rejected} rejected of {rows_in}")
    content = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
    if writer.output.put_if_absent(commit_path(ref.shard, ref.generation), content):
        return record
    for file in written:
        writer.output.delete(file["path"])
    return writer.output.read_commit(ref.shard, ref.generation)


def _count_rows(files: Sequence[dict[str, Any]], kind: str) -> int:
    return sum(file["rows"] for file in files if file["path"].startswith(kind))


def _find_commit(output: Output, ref: ShardRef) -> dict[str, Any] | None:
    if not output.exists(commit_path(ref.shard, ref.generation)):
        return None
    return output.read_commit(ref.shard, ref.generation)


def _write_commit(
    writer: OutputWriter, ref: ShardRef, tables: Iterable[pa.Table], summary: ShardSummary
) -> dict[str, Any]:
    wanted, kept, skipped = decode_rows(summary.rows), [], summary.skipped
    seen = [np.zeros(0, np.int64)]
    labels: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    # Both kinds are written in one pass. If rows are missing at its end, no file stays.
    with writer.open_files("data", ref.name) as data, writer.open_files("rejects", ref.name) as rejects:
        if ref.generation:
            before, files = writer.output.read_commit(ref.shard, ref.generation - 1), load_files(ref.files)
            kept = [asdict(file) for file in files if file.kind == "data"]
            # Of the members only some were read again; the retry counts only rows that it did not find.
            counted = {**before.get("skipped", {}), **summary.skipped}
            skipped = {phrase: number for phrase, number in counted.items() if number}
            labels.update(before["labels"])
            for earlier in _read_rejects(writer.output, files, rejects.schema):
                remaining = earlier.filter(pc.invert(pc.is_in(earlier["row"], pa.array(wanted))))
                reasons.update(count_values(remaining["reason"]))
                rejects.add(remaining)
        for table in tables:
            seen.append(table["row"].to_numpy())
            rejected = _select(table.filter(pc.is_valid(table["reason"])), rejects.schema)
            reasons.update(count_values(rejected["reason"]))
            rejects.add(rejected)
            tagged = _select(table.filter(pc.is_null(table["reason"])), data.schema, writer.format.columns.names)
            labels.update(count_labels(tagged["labels"]))
            data.add(tagged)
        if not np.array_equal(np.concatenate(seen), wanted):
            raise RuntimeError(f"shard {ref.shard} has {sum(map(len, seen))} rows of {len(wanted)} read")
    counts = {"reasons": dict(reasons), "labels": dict(labels), "skipped": dict(skipped)}
    return put_commit(writer, ref, summary.rows_in, [*data.entries, *rejects.entries], counts, kept)


def _select(table: pa.Table, schema: pa.Schema, passed: Collection[str] = ()) -> pa.Table:
    """Convert a part's rows to a final schema. The columns `passed` through have a prefix in parts.

    A passed-through column may have the name of a column of rejects, such as `reason`.
    """
    sources = [COLUMN_PREFIX + name if name in passed else name for name in schema.names]
    return table.select(sources).rename_columns(schema.names).cast(schema)


def _read_rejects(output: Output, files: Iterable[RowFile], schema: pa.Schema) -> Iterator[pa.Table]:
    for file in files:
        if file.kind == "rejects":
            for batch in read_rows(output, file):
                yield pa.Table.from_batches([batch]).replace_schema_metadata(None).cast(schema)
