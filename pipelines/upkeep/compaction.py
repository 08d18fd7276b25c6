"""Compaction: merge an output's small files into files of a good size. Knows no Ray.

Each night adds small files, and a reader of a folder needs milliseconds and a request for each of them. The rows of a
merged file stay in the order of their shards, and the ledger says which of its rows are of which shard.

A merged file counts from the moment at which a ledger names it. One ledger replaces all files that a group of merged
files was made of, so that a reader that goes by the ledgers never sees a row twice, nor misses one. Only then the
replaced files are deleted. A compaction that is killed leaves merged files that no ledger names, or replaced files:
the next one deletes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output.fingerprint import read_fingerprint
from pipelines.output.labels import make_format, read_label_table
from pipelines.output.output import FINGERPRINT, MANIFEST, Output, name_merged, parse_shard
from pipelines.output.row_files import RowFile, read_slices
from pipelines.output.schema import FILE_BYTES
from pipelines.output.state import OutputState, read_state
from pipelines.output.writer import OutputWriter
from pipelines.planning.plan import read_plan
from pipelines.progress import Progress
from storage.files import read_ahead
from storage.settings import ConfigError
from storage.store import Entry, NotFound, StoreError

Kind = Literal["data", "rejects"]
Slices = list[tuple[str, RowFile]]
KINDS: tuple[Kind, ...] = ("data", "rejects")
SMALL_BYTES = FILE_BYTES // 4
"""Files below this size are merged."""
LEAST_FILES = 8
"""A group of fewer small files is merged only if it makes a file that is not small. Without it, each night would write
the rows of the nights before once more."""
SEAL_BYTES = 4 * 2**30
"""About so many bytes are merged before they are made to count, and the files they replace are deleted."""


@dataclass
class Compaction:
    """The result: how many files there were, and are, in `data/` and `rejects/`, and the bytes that were rewritten.

    `kept` groups of files were left as they are, because another run changed one of their shards meanwhile.
    """

    before: int = 0
    after: int = 0
    bytes: int = 0
    kept: int = 0


def compact_output(output: Output, progress: Progress) -> Compaction:
    """Merge the small files of an output. May be repeated, and may run while others read the output or write to it.

    A reader that opened the output before may miss a file that was replaced: it has to open the output again. Memory
    holds some small files, and one merged file if it is small. Raises `ConfigError` if there is no finished output,
    `StoreError`.
    """
    plan, fingerprint = read_plan(output, inputs=False), read_fingerprint(output)
    if not plan.segments or fingerprint is None:
        raise ConfigError(f"{output.uri}: there is no plan here, so this is no output of `sightline tag`")
    state = read_state(output, plan)
    try:
        output.read_json(MANIFEST)
        table = read_label_table(output)
    except NotFound as error:
        raise ConfigError(f"{error}: finish the output with `sightline tag` first") from None
    writer = OutputWriter(output, make_format(fingerprint, table), output.read(FINGERPRINT).decode())
    result = Compaction()
    state.kind = "compaction"
    state.delete_abandoned()
    for kind in KINDS:
        sizes = {file.path: file.bytes for _, file in state.ledger.list_files([kind])}
        result.before += len(sizes)
        result.after += len(sizes)
        groups: list[list[str]] = []
        for group in _choose_groups(sizes):
            groups.append(group)
            if sum(sizes[path] for one in groups for path in one) >= SEAL_BYTES:
                _merge(state, writer, kind, groups, result, progress)
                groups = []
        if groups:
            _merge(state, writer, kind, groups, result, progress)
    state.renew(fingerprint)
    return result


def _choose_groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield groups of small files to merge, given by their sizes in bytes. A group has at most `FILE_BYTES`."""
    group: list[str] = []
    size = 0
    for path, count in [*sizes.items(), ("", 0)]:
        if not path or (count < SMALL_BYTES and size + count > FILE_BYTES):
            if len(group) > 1 and (len(group) >= LEAST_FILES or size >= SMALL_BYTES):
                yield group
            group, size = [], 0
        if count < SMALL_BYTES:
            group.append(path)
            size += count


def _merge(
    state: OutputState,
    writer: OutputWriter,
    kind: Kind,
    groups: list[list[str]],
    result: Compaction,
    progress: Progress,
) -> None:
    """Merge groups of files, and make the merged files count together."""
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
            progress.say(f"merging {len(source):,} files of {kind} ({number} of {len(sources)})")
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
