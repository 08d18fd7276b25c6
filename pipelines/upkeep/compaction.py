"""Compaction: merge an output's small files into files of a good size. Knows no Ray.

Each night adds small files, and a reader of a folder needs milliseconds and a request for each of them. The rows of a
merged file stay in the order of their shards, and the ledger says which of its rows are of which shard.

A merged file counts from the moment at which a ledger names it. One ledger replaces all files that a group of merged
files was made of, so that a reader that goes by the ledgers never sees a row twice, nor misses one. Only then the
replaced files are deleted. A compaction that is killed leaves merged files that no ledger names, or replaced files:
the next one deletes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipelines.output.fingerprint import read_fingerprint
from pipelines.output.labels import make_format, read_label_table
from pipelines.output.output import FINGERPRINT, MANIFEST, Output
from pipelines.output.schema import FILE_BYTES
from pipelines.output.state import read_state
from pipelines.output.writer import OutputWriter
from pipelines.planning.plan import read_plan
from pipelines.progress import Progress
from pipelines.tables.publication import Publication
from pipelines.upkeep.merging import KINDS, Compaction, merge_groups
from storage.settings import ConfigError
from storage.store import NotFound, StoreError

SMALL_BYTES = FILE_BYTES // 4
"""Files below this size are merged."""
LEAST_FILES = 8
"""A group of fewer small files is merged only if it makes a file that is not small. Without it, each night would write
the rows of the nights before once more."""
SEAL_BYTES = 4 * 2**30
"""About so many bytes are merged before they are made to count, and the files they replace are deleted."""


def compact_output(output: Output, progress: Progress) -> Compaction:
    """Merge the small files of an output. May be repeated, and may run while others read the output or write to it.

    A reader that opened the output before may miss a file that was replaced: it has to open the output again. Memory
    holds some small files, and one merged file if it is small. Raises `ConfigError` if there is no finished output,
    `StoreError`, also if the output's tables cannot be brought up to it.
    """
    plan, fingerprint = read_plan(output, inputs=False), read_fingerprint(output)
    if not plan.segments or fingerprint is None:
        raise ConfigError(f"{output.uri}: there is no plan here, so this is no output of `sightline tag`")
    publication = Publication()
    state = read_state(output, plan, publication)
    try:
        output.read_json(MANIFEST)
        table = read_label_table(output)
    except NotFound as error:
        raise ConfigError(f"{error}: finish the output with `sightline tag` first") from None
    writer = OutputWriter(output, make_format(fingerprint, table), output.read(FINGERPRINT).decode())
    # Before files are merged, so that what comes after is known to change no row.
    if not state.bring_up():
        raise StoreError(publication.failure)
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
                merge_groups(state, writer, kind, groups, result, progress.say)
                groups = []
        if groups:
            merge_groups(state, writer, kind, groups, result, progress.say)
    state.renew(fingerprint)
    if publication.failure:
        raise StoreError(f"the files were merged, but {publication.failure}")
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
