"""The output that an endpoint searches, in one state: its files, its index, and the rows that are held in memory.

This is the only module of `serve` that imports `curation`, which reads outputs and searches them: the command line and
the endpoint search with the same code. `curation` imports neither Ray Data nor torch for it. The module is imported
only by an endpoint whose configuration has `search`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.index.labels import number_labels
from curation.index.rows import RowBatch, read_row_batches
from curation.index.search import OpenIndex
from curation.index.state import IndexState, is_current, list_shards, read_index_state, stat_index
from curation.index.table import import_lancedb, name_shard, number_shard
from curation.model import find_texts
from curation.search.folding import fold_embeddings
from curation.search.query import Query, Terms, is_id, list_texts, make_terms
from curation.search.search import Results, search_rows
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from siglip.checkpoints.files import shorten_identity
from siglip.labels import LabelSet
from siglip.scoring import Floats
from storage.settings import ConfigError

__all__ = ["Query", "Results", "SearchedOutput", "Terms", "list_texts"]

IN_MEMORY = 200_000
"""Most rows whose embeddings are held in memory: of an output without an index all, else those that it has not."""


@dataclass(frozen=True)
class SearchedOutput:
    """An output as it was when it was opened. Any number of searches may use it, from any thread.

    With an index, memory holds its sample (50 MB with 768 dimensions), what LanceDB keeps of it (1 GB were measured for
    a million rows of 768 dimensions, the whole vector index), and the rows that it does not have: `recent`, by shard,
    with the generation. If these are more than `IN_MEMORY`, none is held and `not_searched` is their number. Without an
    index `recent` has all rows, and `ordered` the same rows in the order of the output. A row takes 4 bytes for each
    dimension, and about 100 for its key and labels: 200,000 rows of 768 dimensions take 640 MB.
    """

    output: TaggedOutput
    index: OpenIndex | None
    recent: Mapping[int, tuple[int, RowBatch]]
    ordered: Sequence[RowBatch]
    not_searched: int
    index_stamp: str
    opened_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @classmethod
    def open(cls, uri: str, weights: str, before: SearchedOutput | None = None) -> SearchedOutput:
        """Open an output, for a model with these weights. Rows that `before` holds are not read again.

        Raises `ConfigError` for an output that cannot be searched, in one line that names the key of the configuration,
        and `storage.store.StoreError`.
        """
        output, state, stamp = read_output(uri, weights)
        if state is None:
            recent = _read_rows(output, list_shards(output).keys(), before)
            return cls(output, None, recent, _order_rows(output, recent), 0, stamp)
        index = OpenIndex.open(output, state)
        if index.behind > IN_MEMORY:
            return cls(output, index, {}, (), index.behind, stamp)
        return cls(output, index, _read_rows(output, map(number_shard, index.missing), before), (), 0, stamp)

    @property
    def bytes_held(self) -> int:
        """The bytes of the rows that are held in memory."""
        return sum(batch.nbytes for _, batch in self.recent.values())

    @property
    def searched(self) -> int:
        """The number of rows that a search without labels compares."""
        return self.output.rows - self.not_searched

    def is_current(self) -> bool:
        """Tell whether output and index are still as they were. Reads the manifest."""
        return is_current(self.output, self.index_stamp)

    def find_texts(self, labels: LabelSet) -> Floats | None:
        """Return the averaged prompts of labels, (L, D), if the output has them: then the model is not needed."""
        return find_texts(self.output, labels)

    def find_like(self, name: str) -> tuple[list[str], Floats | None, int]:
        """Find the row with a key or an id: the ids of all such rows, and if it is one, embedding and position.

        With an index, an id is found at once; a key is compared with all keys.
        """
        ids = [name] if is_id(name) and self.output.find_positions([name])[0] >= 0 else []
        rows = [] if self.index is None else self.index.table.find_key(name, self.index.stale)
        for _, batch in self.recent.values():
            rows += batch.find_key(name)
        ids = [*dict.fromkeys([*ids, *(f"{name_shard(shard)}/{row}" for shard, row in rows)])]
        if len(ids) != 1:
            return ids, None, -1
        position = int(self.output.find_positions(ids)[0])
        return ids, read_embeddings(self.output.take([position], ["embedding"])), position

    def make_terms(
        self, query: Query, labels: LabelSet | None, texts: Floats | None, examples: Floats, rows: Sequence[int]
    ) -> Terms:
        """Make a query's terms of vectors: see `curation.search.query.make_terms`."""
        return make_terms(query, self.output, labels, texts, examples, rows)

    def search(self, query: Query, terms: Terms) -> Results:
        """Search for a query that `check` has nothing against. Raises `storage.store.StoreError`."""
        if self.index is not None:
            return self.index.search(query, terms, lambda: [batch for _, batch in self.recent.values()])
        labels = [self.labels[label] for label in query.labels]
        starts = np.cumsum([0, *(len(batch.rows) for batch in self.ordered)])

        def read() -> Iterator[tuple[Floats, NDArray[np.bool_] | None]]:
            for batch in self.ordered:
                yield batch.embeddings, batch.labels.have_all(labels) if labels else None

        def fold(positions: NDArray[np.int64], top: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            parts = np.searchsorted(starts, positions, side="right") - 1
            pairs = zip(parts.tolist(), (positions - starts[parts]).tolist(), strict=True)
            rows = [self.ordered[part].embeddings[row] for part, row in pairs]
            return fold_embeddings(np.asarray(rows, np.float32).reshape(len(rows), -1), top)

        return search_rows(self.output, query, terms, read(), fold)

    def read_thumbnails(self, positions: Sequence[int]) -> list[bytes | None]:
        """Return the thumbnails of some rows. Reads those of a whole row group, up to 4,096 rows, for each of them."""
        column: list[bytes | None] = self.output.take(positions, ["thumbnail"])["thumbnail"].to_pylist()
        return column

    @property
    def labels(self) -> Mapping[str, int]:
        """The output's labels, with their numbers."""
        return number_labels(self.output)

    @property
    def templates(self) -> tuple[str, ...]:
        """The templates of the output's label set."""
        return tuple(self.output.labels.templates)

    @property
    def has_thumbnails(self) -> bool:
        """Whether the output has thumbnails."""
        return "thumbnail" in self.output.columns

    def describe(self) -> dict[str, Any]:
        """Return what a client learns about the output: its counts, its labels, and whether it has thumbnails."""
        return {
            "rows": self.output.rows,
            "searched": self.searched,
            "labels": list(self.labels),
            "thumbnails": self.has_thumbnails,
            "index": self.index is not None,
        }


def read_output(uri: str, weights: str) -> tuple[TaggedOutput, IndexState | None, str]:
    """Open an output for a model with these weights: the output, the state of its index, and a stamp of this state.

    Reads no rows. Raises `ConfigError` for an output that cannot be searched, in one line that names the key of the
    configuration, and `storage.store.StoreError`.
    """
    try:
        output = open_output(uri)
        stamp = stat_index(output)  # before the index is read: a later build is seen
        state = read_index_state(output)
    except ConfigError as error:
        raise ConfigError(f"search.output: {error}") from error
    if output.weights != weights:
        raise ConfigError(
            f"search.output: {output.uri} has embeddings of the model {shorten_identity(output.weights)}, and this "
            f"endpoint runs {shorten_identity(weights)}: set model.source to the checkpoint that tagged it, "
            f"{output.model}, with the same model.image_size or model.patches, or name another output"
        )
    if state is None and output.rows > IN_MEMORY:
        raise ConfigError(
            f"search.output: {output.uri} has {output.rows:,} images and no index: run `sightline index {output.uri}`"
        )
    if state is not None:
        import_lancedb()
    return output, state, stamp


def _read_rows(
    output: TaggedOutput, shards: Iterable[int], before: SearchedOutput | None
) -> dict[int, tuple[int, RowBatch]]:
    """Read the rows of some shards, except those that are held already."""
    kept = {} if before is None else before.recent
    wanted = {shard: output.ledger.generation_of(name_shard(shard)) for shard in shards}
    rows = {
        shard: kept[shard] for shard, generation in wanted.items() if shard in kept and kept[shard][0] == generation
    }
    read: dict[int, list[RowBatch]] = {}
    for batch in read_row_batches(output, {name_shard(shard) for shard in wanted if shard not in rows}):
        read.setdefault(batch.shard, []).append(batch)
    return rows | {shard: (wanted[shard], RowBatch.join(batches)) for shard, batches in read.items()}


def _order_rows(output: TaggedOutput, rows: Mapping[int, tuple[int, RowBatch]]) -> list[RowBatch]:
    """Return all rows in the order of the output, which a compaction changes."""
    ordered, used = [], dict.fromkeys(rows, 0)
    for name, _, count in output.runs():
        shard = number_shard(name)
        ordered.append(rows[shard][1].slice(used[shard], count))
        used[shard] += count
    return ordered
