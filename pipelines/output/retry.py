"""Retrying rejected rows: which rows of a committed shard are read again, and with which row numbers.

Rows of a shard are numbered in reading order. When some of its inputs are read again, their row numbers are looked up
in the shard's own files, by source and in order. Rows that were not there at the first reading, such as those of a tar
that was missing, get new numbers after all others.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.inputs.formats import read_inputs
from pipelines.inputs.rows import Input, Reading, Row, Skipped
from pipelines.output.output import Output
from pipelines.output.plan import ShardRef
from storage.store import Changed


@dataclass
class Retry:
    """The rows of a committed shard: row numbers by source, in order, and the numbers `wanted` that are retried.

    `rows_in` is the number of rows in the shard. It grows when a retry finds rows that were not there before.
    """

    numbers: Mapping[str, Sequence[int]]
    wanted: set[int]
    rows_in: int


def list_retries(
    output: Output, planned: Sequence[ShardRef], commits: Mapping[str, int], reasons: Collection[str]
) -> Iterator[ShardRef]:
    """Yield the committed shards that have rows rejected for one of the reasons, as shards to process.

    Without reasons, every rejected row counts. Each shard has the generation after its commit's.
    """
    refs = {ref.shard: ref for ref in planned if ref.shard in commits}
    for record in output.read_commits({shard: commits[shard] for shard in refs}):
        rows = sum(count for reason, count in record["reasons"].items() if not reasons or reason in reasons)
        if rows:
            shard = record["shard"]
            yield replace(refs[shard], rows=rows, generation=commits[shard] + 1)


def find_retry(output: Output, ref: ShardRef, reasons: Collection[str]) -> Retry:
    """Look up which rows of a shard are to be retried: those rejected for one of the reasons, or all rejected rows."""
    record = output.read_commit(ref.shard, ref.generation - 1)
    numbers: dict[str, array[int]] = {}
    wanted: set[int] = set()
    for file in record["files"]:
        rejects = file["path"].startswith("rejects/")
        for rows in output.read_batches(file, ["row", "source", *(["reason"] if rejects else [])]):
            for source, row in zip(rows["source"].to_pylist(), rows["row"].to_pylist(), strict=True):
                numbers.setdefault(source, array("q")).append(row)
            if rejects:
                chosen = rows.filter(pc.is_in(rows["reason"], pa.array(reasons, pa.string()))) if reasons else rows
                wanted.update(chosen["row"].to_pylist())
    for source, found in numbers.items():
        numbers[source] = array("q", sorted(found))
    return Retry(numbers, wanted, record["rows_in"])


def read_retried(
    planned: Sequence[Input], retry: Retry, reading: Reading, skipped: Skipped
) -> Iterator[tuple[int, Row]]:
    """Yield the rows that are retried, with their row numbers.

    Raises `StoreError` as reading does, and `Changed` if an input has fewer rows than at the first reading.
    """
    inputs = [item for item in planned if not retry.wanted.isdisjoint(retry.numbers.get(item.uri, ()))]
    seen: Counter[str] = Counter()
    for item, row in read_inputs(inputs, reading, skipped):
        position, known = seen[item.uri], retry.numbers[item.uri]
        seen[item.uri] += 1
        if position >= len(known):
            number = retry.rows_in
            retry.rows_in += 1
        else:
            number = known[position]
            if number not in retry.wanted:
                continue
        yield number, row
    for uri, count in seen.items():
        if count < len(retry.numbers[uri]):
            raise Changed(f"{uri} has {count} rows where {len(retry.numbers[uri])} were read before")
