"""The local copy of an output that the page reads: Arrow files in a temporary folder, which are memory-mapped.

A page shows images from everywhere in an output. In Parquet, one thumbnail costs a row group of 4,096 rows, and a
similarity with all images costs decoding and, from an object store, downloading all embeddings. So the output is read
once, while the page can be used already. The files are as large as the output is without compression. They are not
kept in memory, but the operating system keeps what is used of them there as long as there is room.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from curation.browse.snapshot import Snapshot
from curation.index.labels import RowLabels, number_labels
from curation.index.state import identify, list_shards
from curation.index.table import name_shard, number_shard
from curation.tagged_output import TaggedOutput
from storage.settings import ConfigError

ROWS = 8192
"""The most rows of a batch."""
_FIRST, _LARGEST = 1, 32
"""Batches of the first file and of the largest ones: each has twice as many as the one before it."""
_REJECTS = ("key", "source", "row", "stage", "reason", "detail")
_SPARE_BYTES = 2**30
SHARD = ":shard"
"""The name of the first column of the files. It is read by its place, because an output may have any column."""


class LocalCopy:
    """Copies an output to a folder, and takes up what is new or was replaced in it. For one thread.

    When another output has taken its place, the copy begins anew, with another `number` (see `Snapshot`).

    Memory holds the rows of one batch, and for each row one byte, the end of its labels, and its labels as numbers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = self._version = self._outputs = 0
        self._begin("")

    def _begin(self, identity: str) -> None:
        self._identity = identity
        self._batches: list[pa.RecordBatch] = []
        self._shards: dict[int, tuple[int, int]] = {}
        self._live = np.zeros(0, np.bool_)
        self._labels = RowLabels.join([])

    def update(self, output: TaggedOutput, publish: Callable[[Snapshot], None]) -> None:
        """Bring the copy up to an output, and publish a snapshot after each file, and at the end.

        Shards that are new are read, and the rows of shards that were replaced are no longer live. Raises `ConfigError`
        if there is no room for the copy, and `StoreError`; what was published before stays right, and the shards that
        were read as a whole until then are not read again by the next call.
        """
        if (identity := identify(output)) != self._identity:
            self._begin(identity)
            self._outputs += 1
        self._live = self._live.copy()  # earlier snapshots have the array
        wanted = list_shards(output)
        gone = [shard for shard, found in self._shards.items() if wanted.get(shard) != found]
        self._forget(gone)
        missing = {name_shard(shard) for shard in wanted if shard not in self._shards}
        self._check_room(output, missing)
        schema = output.format.rejects_schema()
        rejects = pa.Table.from_batches(output.rejects(_REJECTS), pa.schema([schema.field(name) for name in _REJECTS]))
        before = len(self._live)
        try:
            self._copy(
                self._read(output, missing), number_labels(output), lambda: publish(self._snapshot(output, rejects))
            )
        finally:
            self._keep_whole(before, wanted)

    def _copy(self, batches: Iterator[pa.RecordBatch], names: Mapping[str, int], publish: Callable[[], None]) -> None:
        size, done = _FIRST, False
        while not done:
            done = self._write(batches, size, names)
            size = min(_LARGEST, 2 * size)
            publish()

    def _keep_whole(self, before: int, wanted: dict[int, tuple[int, int]]) -> None:
        """Take up the shards all of whose rows are behind the position `before`. The rows of others are read again."""
        parts, start = [], 0
        for batch in self._batches:
            if start >= before:
                parts.append(batch.column(0).to_numpy())
            start += len(batch)
        numbers = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        for shard, count in zip(*(one.tolist() for one in np.unique(numbers, return_counts=True)), strict=True):
            if count == wanted[shard][1]:
                self._shards[shard] = wanted[shard]
        live = np.isin(numbers, list(self._shards))
        if not live.all():
            self._live = np.concatenate([self._live[:before], live])

    def _forget(self, shards: list[int]) -> None:
        if not shards:
            return
        start = 0
        for batch in self._batches:
            self._live[start : start + len(batch)] &= ~np.isin(batch.column(0).to_numpy(), shards)
            start += len(batch)
        for shard in shards:
            del self._shards[shard]

    def _check_room(self, output: TaggedOutput, shards: set[str]) -> None:
        files = {file.path: file.bytes for shard, file in output.ledger.list_files(["data"]) if shard in shards}
        # Embeddings are stored as they are, and thumbnails can hardly be compressed: the rest is small beside them.
        needed = int(1.3 * sum(files.values()))
        free = shutil.disk_usage(self._folder).free
        if needed + _SPARE_BYTES > free:
            raise ConfigError(
                f"the page needs a copy of {output.uri} on this machine of {needed / 1e9:.1f} GB, "
                f"and 1 GB besides; {self._folder} has {free / 1e9:.1f} GB free: name another folder with --copy-to"
            )

    def _read(self, output: TaggedOutput, shards: set[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of shards as batches of `ROWS`, whatever the shards' sizes are.

        If a shard cannot be read, the shards before it are yielded as a whole, and then the exception goes on.
        """
        waiting: list[pa.RecordBatch] = []
        rows, failure = 0, None
        try:
            for shard, _, batch in output.shard_batches(shards, output.columns, ROWS) if shards else ():
                numbers = pa.array(np.full(len(batch), number_shard(shard), np.int64))
                fields = [pa.field(SHARD, pa.int64()), *batch.schema]
                waiting.append(pa.RecordBatch.from_arrays([numbers, *batch.columns], schema=pa.schema(fields)))
                rows += len(batch)
                while rows >= ROWS:
                    table = pa.Table.from_batches(waiting).combine_chunks()
                    yield from table.slice(0, ROWS).to_batches()
                    waiting, rows = table.slice(ROWS).to_batches(), rows - ROWS
        except Exception as error:
            failure = error
        if rows:
            yield from pa.Table.from_batches(waiting).combine_chunks().to_batches()
        if failure is not None:
            raise failure

    def _write(self, batches: Iterator[pa.RecordBatch], count: int, names: Mapping[str, int]) -> bool:
        """Write up to `count` batches to a new file, and take it up. Tell whether there are no more.

        If the next batch cannot be read, what was written until then is taken up, and the exception goes on.
        """
        first = next(batches, None)
        if first is None:
            return True
        path = self._folder / f"rows-{self._files}.arrow"
        self._files += 1
        done, failure = False, None
        try:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, first.schema) as writer:
                writer.write_batch(first)
                for _ in range(count - 1):
                    try:
                        batch = next(batches, None)
                    except Exception as error:
                        failure = error
                        break
                    if batch is None:
                        done = True
                        break
                    writer.write_batch(batch)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        written = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        path.unlink()  # its bytes stay until the process ends, however it ends
        self._batches += written
        self._live = np.concatenate([self._live, np.ones(sum(map(len, written)), np.bool_)])
        self._labels = RowLabels.join([self._labels, *(RowLabels.read(batch["labels"], names) for batch in written)])
        if failure is not None:
            raise failure
        return done

    def _snapshot(self, output: TaggedOutput, rejects: pa.Table) -> Snapshot:
        self._version += 1
        return Snapshot(
            output,
            tuple(self._batches),
            self._live,
            self._labels,
            rejects,
            output.rows,
            self._version,
            self._outputs,
        )
