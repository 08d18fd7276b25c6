"""Merging data and reject files: the rows of several files in one, and a ledger that says where they are now.

A merged file counts from the moment at which a ledger names it. One ledger replaces all files that a group of merged
files was made of, so that a reader that goes by the ledgers never sees a row twice, nor misses one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output.output import Output, name_merged, parse_shard
from pipelines.output.row_files import RowFile, read_slices
from pipelines.output.state import OutputState
from pipelines.output.writer import OutputWriter
from storage.files import read_ahead
from storage.store import Entry, NotFound, StoreError

Kind = Literal["data", "rejects"]
Slices = list[tuple[str, RowFile]]
KINDS: tuple[Kind, ...] = ("data", "rejects")


@dataclass
class Compaction:
    """The result: how many files there were, and are, in `data/` and `rejects/`, and the bytes that were rewritten.

    `kept` groups of files were left as they are, because another run changed one of their shards meanwhile.
    """

    before: int = 0
    after: int = 0
    bytes: int = 0
    kept: int = 0


def merge_groups(
    state: OutputState,
    writer: OutputWriter,
    kind: Kind,
    groups: list[list[str]],
    result: Compaction,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Merge groups of files, and make the merged files count together. Rows that do not count are left out.

    Raises `StoreError`. A group may have one file.
    """
    wanted = {path: number for number, group in enumerate(groups) for path in group}
    sources: list[dict[str, Slices]] = [{} for _ in groups]
    for shard, file in state.ledger.list_files([kind]):
        if file.path in wanted:
            sources[wanted[file.path]].setdefault(file.path, []).append((shard, file))
    state.announce({parse_shard(shard)[0] for source in sources for slices in source.values() for shard, _ in slices})
    merged: dict[str, list[RowFile]] = {}
    written: dict[str, int] = {}
    count = state.ledger.count
    try:
        for number, source in enumerate(sources, 1):
            say(f"merging {len(source):,} files of {kind} ({number} of {len(sources)})")
            for shard, file in _write_merged(writer, kind, source):
                merged.setdefault(shard, []).append(file)
                written[file.path] = file.bytes
        # A compaction on a machine whose clock is ahead may take them for abandoned.
        if gone := [path for path in written if not state.output.exists(path)]:
            raise NotFound(f"{state.output.uri_of(gone[0])} was deleted before it counted: run the command again")
    except BaseException as error:  # Ctrl-C and SIGTERM too
        _discard(state.output, written)
        if not isinstance(error, NotFound):
            raise
        state.ledger.refresh()
        if state.ledger.count == count:
            raise
        result.kept += len(groups)  # another compaction, or a run, has replaced a file and deleted it
        return
    # If this raises an exception, the ledger may be written all the same: the merged files stay.
    if not state.ledger.replace_files(kind, merged, set(wanted)):
        _discard(state.output, written)
        result.kept += len(groups)
        return
    result.after += len(written) - len(wanted)
    result.bytes += sum(written.values())


def _discard(output: Output, paths: Iterable[str]) -> None:
    """Delete merged files that do not count. If the store fails, they stay until a later compaction deletes them."""
    with suppress(StoreError):
        for path in paths:
            output.delete(path)


def _write_merged(writer: OutputWriter, kind: Kind, source: Mapping[str, Slices]) -> Slices:
    """Write the rows of some files to a merged one, or to a few, and return the rows of each shard in them.

    Raises `StoreError` if a file does not have the rows that the ledger says.
    """
    found: list[tuple[str, int]] = []
    rows = sum(file.rows for slices in source.values() for _, file in slices)
    with writer.open_files(kind, name_merged()) as files:
        entries = [Entry(writer.output.uri_of(path), slices[0][1].bytes, "") for path, slices in source.items()]
        for (entry, data), slices in zip(read_ahead(writer.output.store, entries), source.values(), strict=True):
            try:
                with pq.ParquetFile(pa.BufferReader(data)) as parquet:
                    for shard, batch in read_slices(parquet, slices):
                        files.add(pa.Table.from_batches([batch]).replace_schema_metadata(None).cast(files.schema))
                        found.append((shard, len(batch)))
            except (pa.ArrowException, OSError) as error:
                raise StoreError(f"{entry.uri} cannot be read: {error}") from error
        if rows != sum(count for _, count in found):
            raise StoreError(
                f"{len(source)} files of {kind} lack some of the {rows} rows that were committed: run verify"
            )
    return list(_cut(found, files.entries))


def _cut(found: list[tuple[str, int]], entries: list[dict[str, Any]]) -> Iterator[tuple[str, RowFile]]:
    """Yield which rows of which file are of which shard. `found` are the shards of the rows, in the files' order."""
    position = number = 0
    for shard, pairs in groupby(found, key=lambda pair: pair[0]):
        left = sum(count for _, count in pairs)
        while left:
            entry = entries[number]
            taken = min(left, entry["rows"] - position)
            yield shard, RowFile(entry["path"], taken, entry["bytes"], entry["sha256"], position)
            position, left = position + taken, left - taken
            if position == entry["rows"]:
                position, number = 0, number + 1
