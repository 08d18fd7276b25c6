"""Building an index: `sightline index`. It takes up what the output has and the index has not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import pyarrow as pa

from curation.index.labels import RowLabels, number_labels
from curation.index.recall import ENOUGH, choose_probes, measure_recall, scan_truth
from curation.index.state import About, IndexState, identify, list_shards, lock_index, read_index_state
from curation.index.table import IndexTable, import_lancedb, name_shard, number_shard
from curation.tagged_output import TaggedOutput

TRAINED_FROM = 20_000
"""Rows from which on there is a vector index. Fewer are all compared: that takes milliseconds, and is exact."""
_BATCHES_A_COMMIT = 32
"""Batches of 8,192 rows that are added with one commit. A build that is killed goes on after the last one."""


@dataclass(frozen=True)
class Built:
    """What a build did: `rows` are in the index, of which `added` were added; `removed` rows were replaced or doubled.

    `trained` says why the vector index was trained, empty if it was not. `recall_images` and `recall_texts` are the
    shares of the ten nearest images that searches find, `probes` the partitions that they look into, 0 without a
    vector index.
    """

    rows: int
    added: int
    removed: int
    trained: str
    probes: int
    recall_images: float
    recall_texts: float


def build_index(output: TaggedOutput, tell: Callable[[str], None] = lambda line: None) -> Built:
    """Bring the index of an output up to the output, and measure what it finds. `tell` gets lines about the progress.

    Only shards that are new, or in another generation than in the index, are read to be added: a compaction changes
    neither. Rows are added in commits of 262,144, and a later build goes on after the last commit. Searches use the
    earlier state of the index until the end.

    Afterwards all embeddings of the output are read once, to measure recall@10 against an exact search, and to draw a
    sample for the estimate of cut-offs. The vector index is trained anew if less than 95 % of the nearest images are
    found, or the rows have doubled since it was trained. An index of an earlier version of Sightline is made anew.

    Memory holds a few batches, the sample, about 300 bytes a shard, and what LanceDB needs: 1.2 GB in all were measured
    for 200,000 rows of 768 dimensions, 1.6 GB for 400,000.

    Raises `ConfigError` if LanceDB is not installed, if another build is at work, and if the index is that of another
    output; `storage.store.StoreError`.
    """
    import_lancedb()
    before = read_index_state(output, earlier=True)
    with lock_index(output):
        table = IndexTable.open(output)
        wanted = list_shards(output)
        removed = _remove(table, wanted)
        added = _add(output, table, wanted, tell)
        return _finish(output, table, wanted, before, added, removed, tell)


def _remove(table: IndexTable, wanted: Mapping[int, tuple[int, int]]) -> int:
    """Delete the shards that the output does not have so: replaced ones, half ones of a killed build, doubled ones."""
    stored = table.count_shards()
    wrong = [shard for shard, found in stored.items() if wanted.get(shard) != found]
    table.delete(wrong)
    return sum(stored[shard][1] for shard in wrong)


def _add(
    output: TaggedOutput, table: IndexTable, wanted: Mapping[int, tuple[int, int]], tell: Callable[[str], None]
) -> int:
    stored = table.count_shards()
    missing = {name_shard(shard): generation for shard, (generation, _) in wanted.items() if shard not in stored}
    rows, total = 0, sum(wanted[number_shard(shard)][1] for shard in missing)
    batches = _read(output, missing, table.schema)
    while (first := next(batches, None)) is not None:
        counts: list[int] = []
        table.add(_count(chain([first], islice(batches, _BATCHES_A_COMMIT - 1)), counts))
        rows += sum(counts)
        tell(f"{rows:,} of {total:,} new images are in the index")
    return rows


def _count(batches: Iterable[pa.RecordBatch], counts: list[int]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        counts.append(len(batch))
        yield batch


def _read(output: TaggedOutput, shards: Mapping[str, int], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    if not shards:
        return
    names = number_labels(output)
    for shard, _, batch in output.shard_batches(shards.keys(), ["row", "key", "labels", "embedding"]):
        count = len(batch)
        columns = [
            pa.array(np.full(count, number_shard(shard), np.int64)),
            pa.array(np.full(count, shards[shard], np.int16)),
            batch["row"].cast(pa.int64()),
            batch["key"].cast(pa.string()),
            RowLabels.read(batch["labels"], names).to_arrow(),
            batch["embedding"].cast(schema.field("vector").type),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _finish(
    output: TaggedOutput,
    table: IndexTable,
    wanted: Mapping[int, tuple[int, int]],
    before: IndexState | None,
    added: int,
    removed: int,
    tell: Callable[[str], None],
) -> Built:
    rows = table.rows
    known = before.about if before is not None else None
    if before is not None and known is not None and not added and not removed and before.list_shards() == wanted:
        return Built(rows, 0, 0, "", known.probes, known.recall_images, known.recall_texts)
    trained_rows, probes = (known.trained, known.probes) if known is not None and table.is_trained() else (0, 0)
    why, partitions = "", 0
    if rows >= TRAINED_FROM and (not trained_rows or rows >= 2 * trained_rows):
        why = "there are twice as many images as before" if trained_rows else "there was no vector index"
        tell("training the vector index ...")
        partitions = table.train()
    table.take_up()
    tell("comparing searches with an exact scan ...")
    truth = scan_truth(output, seed=rows)
    recalls = measure_recall(table, truth, probes) if trained_rows and not why else (1.0, 1.0)
    if min(recalls) < ENOUGH:
        why = f"only {min(recalls):.3f} of the nearest images were found"
        tell(f"{why}: training the vector index anew ...")
        partitions = table.train()
    if why:
        trained_rows, probes = rows, choose_probes(table, truth, partitions)
    if why or not trained_rows:
        recalls = measure_recall(table, truth, max(probes, 1))
    version = table.version
    previous = known.version if known is not None else 0
    about = About(version, previous, output.weights, identify(output), rows, trained_rows, probes, *recalls)
    pairs = sorted(wanted.items())
    shards, generations, counts = np.asarray([(shard, *found) for shard, found in pairs], np.int64).reshape(-1, 3).T
    drawn, labels = (truth.sample, truth.sample_shards), truth.sample_labels
    IndexState(about, shards, generations, counts, *drawn, labels.starts, labels.numbers).write(output)
    table.clean(previous or version)
    return Built(rows, added, removed, why, probes, *recalls)
