"""Rejected rows taken up again: which, and what they are of.

Rows of a shard are numbered as they are read. A later reading of some of its inputs finds their old numbers in the
shard's own files, by source and in order; rows that were not there before, such as those of a tar that was missing, get
new numbers behind all others.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.inputs.formats import read_inputs
from pipelines.inputs.plan import ShardRef
from pipelines.inputs.rows import Input, Reading, Row, Skipped
from pipelines.output.layout import read_commit, read_commits
from storage.store import Changed, Store, join


@dataclass
class Retry:
    """A committed shard's rows: the numbers of each source's, in order, and those that are taken up again. `rows_in`
    grows with rows that were not there before.
    """

    numbers: dict[str, list[int]]
    wanted: set[int]
    rows_in: int


def list_retries(
    store: Store, output: str, planned: Sequence[ShardRef], commits: Mapping[str, int], reasons: Collection[str]
) -> Iterator[ShardRef]:
    """The committed shards with rows rejected for one of the reasons (for any, if there are none), as shards to do."""
    refs = {ref.shard: ref for ref in planned if ref.shard in commits}
    for record in read_commits(store, output, {shard: commits[shard] for shard in refs}):
        rows = sum(count for reason, count in record["reasons"].items() if not reasons or reason in reasons)
        if rows:
            shard = record["shard"]
            yield replace(refs[shard], rows=rows, generation=commits[shard] + 1)


def find_retry(store: Store, output: str, ref: ShardRef, reasons: Collection[str]) -> Retry:
    """InputStats up the rows of a shard to be done again."""
    record = read_commit(store, output, ref.shard, ref.generation - 1)
    tables = []
    for file in record["files"]:
        names = ["row", "source", *(["reason"] if file["path"].startswith("rejects/") else [])]
        table = pq.read_table(io.BytesIO(store.read(join(output, file["path"]))), columns=names)
        tables.append(table.replace_schema_metadata(None))
    rows = pa.concat_tables(tables, promote_options="default").sort_by("row")
    numbers: dict[str, list[int]] = {}
    for number, source in zip(rows["row"].to_pylist(), rows["source"].to_pylist(), strict=True):
        numbers.setdefault(source, []).append(number)
    chosen = pc.is_in(rows["reason"], pa.array(reasons, pa.string())) if reasons else pc.is_valid(rows["reason"])
    return Retry(numbers, set(rows.filter(chosen)["row"].to_pylist()), record["rows_in"])


def read_retried(
    planned: Sequence[Input], retry: Retry, reading: Reading, skipped: Skipped
) -> Iterator[tuple[int, Row]]:
    """The rows that are taken up again, with their numbers. Raises `StoreError`, as reading does."""
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
