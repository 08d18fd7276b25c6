"""Committing: receipts to complete shards, a complete shard's parts to its files and its record.

Committing reads a shard's parts, keeps each row once, writes the final files, and only then puts the commit record,
which is the moment that counts: a shard without one is not there. All of it may be done again at any point: by a task
that is replayed, or by another run at the same time. The first record stands, and the others clean up after themselves.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from pipelines.cluster import COMMIT_CPUS, RETRIES
from pipelines.inputs.listing import Waiting
from pipelines.inputs.plan import ShardRef
from pipelines.output.layout import COLUMN_PREFIX, commit_uri, read_commit, shard_name
from pipelines.output.parts import Ending, PartWriter, covers, decode_rows, read_parts
from pipelines.run_report import Progress, RunReport
from storage.store import NotFound, Store, join

FINGERPRINT_KEY = b"sightline.fingerprint"
_KINDS = ("data/", "rejects/")
_ROW_GROUP_ROWS = 4096
_SPOOLED_BYTES = 64 * 2**20
"""An encoded file up to this size is kept in memory until it is put, a larger one on the disk."""

# Scores and vectors are close to random bits: dictionaries of them cost time and save nothing.
ENCODING: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["source", "labels.list.element", "bands.list.element", "stage", "reason"],
}
"""How `data/` and `rejects/` are written: options of `pyarrow.parquet.ParquetWriter`."""


@dataclass
class Ledger:
    """Receipts of shards in flight. Says when a shard is complete; forgets it when it is taken to be committed.

    Holds a few numbers for each part of the shards in work, and of the others only the names of those to come. A
    receipt of a shard that was taken, which a replayed task may send, means nothing.
    """

    pending: dict[str, ShardRef]
    parts: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    endings: dict[str, Ending] = field(default_factory=dict)

    def add(self, receipt: dict[str, Any]) -> Ending | None:
        """Note a receipt. The shard's ending, when all of its rows are now written, or when it ended with trouble."""
        shard = receipt["shard"]
        if shard not in self.pending:
            return None
        if receipt["part"]:
            self.parts.setdefault(shard, {})[receipt["part"]] = receipt["rows"]
        if receipt["ending"] is not None:
            self.endings[shard] = Ending.from_json(receipt["ending"])
        ending = self.endings.get(shard)
        done = ending is not None and (ending.wait or covers([*self.parts.get(shard, {}).values()], ending.rows))
        return ending if done else None

    def take(self, shard: str) -> tuple[ShardRef, dict[str, list[int]]]:
        """A shard and its parts with the runs of their rows, which are forgotten."""
        self.endings.pop(shard, None)
        return self.pending.pop(shard), self.parts.pop(shard, {})


class Committer:
    """Turns receipts into commits while the dataset runs. The commits themselves are tasks of the cluster.

    `count_at_once` says how many commits may run at once: as many as shards are read. Each that finds no idle worker
    starts one, which takes longer than to commit a shard.

    `waiting` are the shards that ended with trouble of the store: nothing of theirs is committed.
    """

    def __init__(
        self,
        pending: Iterable[ShardRef],
        writer: PartWriter,
        account: RunReport,
        progress: Progress,
        count_at_once: Callable[[], int],
    ) -> None:
        self.waiting: list[Waiting] = []
        self._ledger = Ledger({shard_name(ref.shard, ref.generation): ref for ref in pending})
        self._writer = writer
        self._remote_writer = ray.put(writer)
        self._account = account
        self._progress = progress
        self._count_at_once = count_at_once
        self._complete: deque[tuple[ShardRef, dict[str, list[int]], Ending]] = deque()
        self._in_flight: list[ray.ObjectRef[str]] = []
        self._unused: list[str] = []
        self._aside: set[str] = set()

    def receive(self, receipt: dict[str, Any]) -> None:
        """Note a receipt, have its shard committed if that completes it, and look after commits that have finished."""
        self._account.add(receipt)
        self._progress.update(rows=receipt["tagged"] + receipt["rejected"], rejects=receipt["rejected"])
        shard = receipt["shard"]
        if shard in self._aside and receipt["part"]:
            self._unused.append(receipt["part"])
        ending = self._ledger.add(receipt)
        if ending is not None:
            ref, parts = self._ledger.take(shard)
            if ending.wait:
                self._set_aside(shard, ref, ending, parts)
            else:
                self._account.lost += ending.lost
                self._complete.append((ref, parts, ending))
        if self._in_flight:
            done, self._in_flight = ray.wait(self._in_flight, num_returns=len(self._in_flight), timeout=0)
            self._note(done)
        self._start_commits()

    def finish(self) -> None:
        """Wait until all that is complete is committed, and remove the parts of shards that wait."""
        while self._in_flight:
            done, self._in_flight = ray.wait(self._in_flight)
            self._note(done)
            self._start_commits()
        store = self._writer.open()
        for part in self._unused:
            store.delete(part)

    def _start_commits(self) -> None:
        while self._complete and len(self._in_flight) < self._count_at_once():
            self._in_flight.append(_commit.remote(self._remote_writer, *self._complete.popleft()))

    def _set_aside(self, shard: str, ref: ShardRef, ending: Ending, parts: Iterable[str]) -> None:
        assert ending.wait is not None
        self._aside.add(shard)
        self._unused += parts
        self.waiting.append(Waiting(shard, ending.wait, ending.detail, ref.rows))
        self._progress.update(waiting=1)

    def _note(self, done: list[ray.ObjectRef[str]]) -> None:
        for _ in ray.get(done):
            self._account.shards += 1
            self._progress.update(shards=1)


@ray.remote(num_cpus=COMMIT_CPUS, max_retries=RETRIES)
def _commit(writer: PartWriter, ref: ShardRef, parts: dict[str, list[int]], ending: Ending) -> str:
    commit_shard(writer, ref, parts, ending)
    return ref.shard


def commit_shard(
    writer: PartWriter, ref: ShardRef, parts: Mapping[str, Sequence[int]], ending: Ending
) -> dict[str, Any]:
    """Turn a complete shard's parts into its files and put its commit record. Returns the record that is in place.

    `parts` are those that its receipts name, with the runs of the rows in each. What is tagged is in memory a row group
    at a time, however large the shard is.

    When the shard was committed before, by another run or by this very task before its process died, that record
    stands. Of a later generation, rows that the parts hold replace the rejects of the one before. Raises `RuntimeError`
    when the parts do not hold every row.
    """
    store = writer.open()
    record = _find_commit(store, writer.output, ref)
    if record is None:
        try:
            record = _write_commit(store, writer, ref, read_parts(store, parts), ending)
        except NotFound:
            # Another run finished meanwhile and removed the parts, as it does for every shard that is committed.
            record = _find_commit(store, writer.output, ref)
            if record is None:
                raise
    for part in parts:
        store.delete(part)
    return record


def _find_commit(store: Store, output: str, ref: ShardRef) -> dict[str, Any] | None:
    if store.stat(commit_uri(output, ref.shard, ref.generation)) is None:
        return None
    return read_commit(store, output, ref.shard, ref.generation)


def _write_commit(
    store: Store, writer: PartWriter, ref: ShardRef, tables: Iterable[pa.Table], ending: Ending
) -> dict[str, Any]:
    schema, rejects_schema = writer.format.data_schema(), writer.format.rejects_schema()
    wanted, kept, skipped = decode_rows(ending.rows), [], ending.skipped
    seen, rejects = [np.zeros(0, np.int64)], [rejects_schema.empty_table()]
    labels: Counter[str] = Counter()

    def select_tagged() -> Iterator[pa.Table]:
        for table in tables:
            seen.append(table["row"].to_numpy())
            rejects.append(_select(table.filter(pc.is_valid(table["reason"])), rejects_schema))
            tagged = _select(table.filter(pc.is_null(table["reason"])), schema)
            labels.update(count_labels(tagged["labels"]))
            yield tagged
        if not np.array_equal(np.concatenate(seen), wanted):  # before the file is put
            raise RuntimeError(f"shard {ref.shard} has {sum(map(len, seen))} rows of {len(wanted)} read")

    written = write_file(store, writer, "data", ref, select_tagged())
    rejected = pa.concat_tables(rejects)
    if ref.generation:
        before = read_commit(store, writer.output, ref.shard, ref.generation - 1)
        kept = [file for file in before["files"] if file["path"].startswith("data/")]
        earlier = _read_rejects(store, writer.output, before, rejects_schema)
        remaining = earlier.filter(pc.invert(pc.is_in(earlier["row"], pa.array(wanted))))
        rejected = pa.concat_tables([remaining, rejected]).sort_by("row")
        skipped = before.get("skipped", {})
        labels.update(before["labels"])
    written += write_file(store, writer, "rejects", ref, [rejected])
    counts = {"reasons": _count(rejected["reason"]), "labels": dict(labels), "skipped": dict(skipped)}
    return put_commit(store, writer, ref, ending.rows_in, written, counts, kept)


def write_file(
    store: Store, writer: PartWriter, kind: str, ref: ShardRef, tables: Iterable[pa.Table]
) -> list[dict[str, Any]]:
    """Write a shard's rows of the kind `data` or `rejects`, a row group in memory at a time.

    Returns the file's entry for the commit record, and no entry where there are no rows: then there is no file.
    """
    rows = 0
    schema = writer.format.data_schema() if kind == "data" else writer.format.rejects_schema()
    with tempfile.SpooledTemporaryFile(_SPOOLED_BYTES) as spool:
        with pq.ParquetWriter(spool, schema.with_metadata(file_metadata(writer)), **ENCODING) as file:
            for table in _group_rows(tables):
                file.write_table(table, row_group_size=_ROW_GROUP_ROWS)
                rows += table.num_rows
        return [put_file(store, writer, kind, ref, rows, spool)] if rows else []


def _group_rows(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows as tables of whole row groups, and the rest."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        rows = sum(each.num_rows for each in waiting)
        if rows >= _ROW_GROUP_ROWS:
            whole = pa.concat_tables(waiting)
            full = rows - rows % _ROW_GROUP_ROWS
            yield whole.slice(0, full)
            waiting = [whole.slice(full)]
    if any(each.num_rows for each in waiting):
        yield pa.concat_tables(waiting)


def file_metadata(writer: PartWriter) -> dict[bytes, bytes]:
    """What each file says of the output that it belongs to."""
    return {FINGERPRINT_KEY: writer.fingerprint.encode()}


def put_file(
    store: Store, writer: PartWriter, kind: str, ref: ShardRef, rows: int, data: bytes | IO[bytes]
) -> dict[str, Any]:
    """Write a file of a shard, of the kind `data` or `rejects`, that is encoded. Returns its entry likewise."""
    path = f"{kind}/{shard_name(ref.shard, ref.generation)}-{uuid.uuid4().hex[:12]}.parquet"
    entry = store.put(join(writer.output, path), data)
    content = io.BytesIO(data) if isinstance(data, bytes) else data
    content.seek(0)
    digest = hashlib.file_digest(content, "sha256")  # type: ignore[arg-type]  # any file will do
    return {"path": path, "rows": rows, "bytes": entry.size, "etag": entry.etag, "sha256": digest.hexdigest()}


def put_commit(
    store: Store,
    writer: PartWriter,
    ref: ShardRef,
    rows_in: int,
    written: Sequence[dict[str, Any]],
    counts: dict[str, dict[str, int]],
    kept: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Put a shard's commit record, its files being there. Returns the record that is in place: the first that was put.

    `written` are the files that this commit is of; where another stands, they are removed. `kept` are those of an
    earlier generation that stay the shard's. `counts` has its `reasons`, `labels` and `skipped` members. Raises
    `RuntimeError` when the rows do not add up.
    """
    files = [*kept, *written]
    tagged, rejected = (sum(file["rows"] for file in files if file["path"].startswith(kind)) for kind in _KINDS)
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
    if store.put_if_absent(commit_uri(writer.output, ref.shard, ref.generation), content):
        return record
    for file in written:
        store.delete(join(writer.output, file["path"]))
    return read_commit(store, writer.output, ref.shard, ref.generation)


def _select(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A part's rows in a final schema, in which passed columns have their own names."""
    names = set(table.column_names)
    sources = [COLUMN_PREFIX + name if COLUMN_PREFIX + name in names else name for name in schema.names]
    return table.select(sources).rename_columns(schema.names).cast(schema)


def _read_rejects(store: Store, output: str, record: dict[str, Any], schema: pa.Schema) -> pa.Table:
    paths = [file["path"] for file in record["files"] if file["path"].startswith("rejects/")]
    tables = [pq.read_table(io.BytesIO(store.read(join(output, path)))) for path in paths]
    return pa.concat_tables([schema.empty_table(), *(table.replace_schema_metadata(None) for table in tables)])


def _count(column: pa.ChunkedArray) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist()}


def count_labels(labels: pa.ChunkedArray) -> dict[str, int]:
    """How many images carry each label, the best label of each image only: tags by label add up to the images."""
    column = labels.combine_chunks()
    best = pc.list_element(column.filter(pc.greater(pc.list_value_length(column), 0)), 0)
    return _count(pa.chunked_array([best]))
