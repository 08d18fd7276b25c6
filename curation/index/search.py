"""Search with an index: the nearest images from the index, and from an exact scan of those that it does not have yet.

Several texts, or texts with an example, order images by the lowest of several similarities. The nearest images of each
are found, and compared with all. An image that is among none of them has each similarity below that of the last image
found for it; so those that rank above all such images are known. Means and standard deviations, in which texts and
examples are compared, are estimated from the sample. A condition in SQL holds for other images than those that an index
finds: it is left to the exact search, and a note says so.

The cut-off of a text needs the scores of all images too, but only as an estimate of a share. The images with the
highest scores, which decide, are found by the index. Those with lower ones are represented by the sample of the index,
16,384 images drawn at random, each of which stands for as many as there are for each in the sample. So the number of
relevant images is counted if the cut-off is among the found ones, and else estimated. The limit of an unwanted text is
estimated in the same way, from the images that are nearest to it.

Labels are a condition of the search in the table and not of its results. As few of the images in a partition may have
them, more partitions are looked into; and only those images of the sample count that have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curation.index.labels import number_labels
from curation.index.nearest import Nearest, NearRows, count_logits
from curation.index.rows import RowBatch, read_row_batches
from curation.index.state import IndexState, list_shards, read_index_state
from curation.index.table import IndexTable, count_partitions, name_shard
from curation.search.cutoff import LogitCounts, find_training_share
from curation.search.folding import fold_embeddings
from curation.search.query import Query, Terms, embed_query
from curation.search.search import Results, compare, make_table, search_output
from curation.tagged_output import TaggedOutput, read_vectors
from siglip.config import ModelConfig
from siglip.scoring import Floats, sigmoid
from storage.settings import ConfigError

FOUND = 1000
"""The fewest rows that are asked for, however few are shown, where a cut-off is estimated from them."""
MOST = 2000
"""The most results: their embeddings are in memory, and with --fold those of twenty times as many rows."""
DEEPEST = 20_000
"""The most rows that are asked for, of all texts and examples together, because too few of those found are results."""
_FILLED = 4
"""Rows that the partitions should have for each that is asked for."""


def search_index(output: TaggedOutput, query: Query, model: ModelConfig | None = None) -> Results:
    """Search an output with its index, which `curation.index.build.build_index` makes.

    The results are those of `curation.search.search.search_output`, except that a few of the nearest images may not be
    among them: the index says how many were found when it was measured. The scores are the same. Images that the index
    does not have are compared exactly, and a note says how many. A query that the index cannot answer is searched for
    exactly, and a note says why.

    Memory holds the found rows, the sample, about 500 bytes a shard, and what LanceDB reads. Raises
    `ConfigError` if there is no index or LanceDB is not installed, and what `search_output` raises.
    """
    query.check(output)
    state = read_index_state(output)
    if state is None:
        raise ConfigError(f"{output.uri} has no index: make one with `sightline index {output.uri}`")
    if why := why_exact(query):
        results = search_output(output, query, model)
        return replace(results, notes=(f"every image is compared, without the index: {why}",))
    index = OpenIndex.open(output, state)
    terms = embed_query(query, output, model)
    results = index.search(query, terms, lambda: read_row_batches(output, index.missing))
    if not index.missing:
        return results
    note = f"{index.behind:,} images are not in the index yet, and were compared besides"
    return replace(results, notes=(note, *results.notes))


def why_exact(query: Query) -> str:
    """Return why an index cannot answer a query, or an empty text."""
    if query.where is not None:
        return "a condition holds for other images than those that it finds"
    if query.top > MOST:
        return f"it finds up to {MOST:,}"
    return ""


@dataclass(frozen=True)
class OpenIndex:
    """An output and its index, opened for any number of searches of the same state of both.

    `indexed` are the shards that the table has as the output has them. `stale` are others of the table, whose rows are
    never found, and `missing` the names of those that the table does not have, with `behind` images. Memory holds the
    sample, 50 MB of float32 with 768 dimensions, and what LanceDB keeps.
    """

    output: TaggedOutput
    state: IndexState
    table: IndexTable
    indexed: Mapping[int, tuple[int, int]]
    stale: Sequence[int]
    missing: frozenset[str]
    behind: int
    sample: Floats

    @classmethod
    def open(cls, output: TaggedOutput, state: IndexState) -> OpenIndex:
        """Open an index. Raises what `IndexTable.open` raises."""
        wanted = list_shards(output)
        indexed = {shard: found for shard, found in state.list_shards().items() if wanted.get(shard) == found}
        column = pa.FixedSizeListArray.from_arrays(pa.array(state.sample.reshape(-1)), state.sample.shape[1])
        return cls(
            output,
            state,
            IndexTable.open(output, state.about.version),
            indexed,
            [shard for shard in state.shards.tolist() if shard not in indexed],
            frozenset(name_shard(shard) for shard in wanted if shard not in indexed),
            sum(rows for shard, (_, rows) in wanted.items() if shard not in indexed),
            read_vectors(column),
        )

    def search(self, query: Query, terms: Terms, read: Callable[[], Iterable[RowBatch]]) -> Results:
        """Search for a query that `why_exact` has nothing against, with its terms.

        `read` returns the rows that the table does not have and that are compared besides. It may be called twice.
        """
        wanted = query.top + len(terms.shown)  # the examples themselves are no results
        estimates = bool(terms.wanted) and query.cutoff == "auto"
        # Folding may need more rows than results.
        most = max(FOUND if estimates or query.without else 0, (20 if query.fold else 4) * query.top) + len(terms.shown)
        nearest = self._find(query, terms, most, read)
        lists = terms.wanted + (terms.example is not None)
        if lists == 1 and not query.without:
            return self._collect(query, terms, nearest)
        deepest = DEEPEST // lists
        if nearest.may_lack(20 * wanted if query.fold else wanted) and most < deepest:
            nearest = self._find(query, terms, deepest, read)
        results = self._collect(query, terms, nearest)
        if nearest.may_lack(wanted) and results.table.num_rows < query.top:
            note = f"only the {deepest:,} nearest images were looked at: nearly all show something unwanted"
            if lists > 1:
                note = (
                    f"only the {deepest:,} images nearest to each text or example were looked at: there may be others"
                )
            return replace(results, notes=(note,))
        return results

    def _find(self, query: Query, terms: Terms, most: int, read: Callable[[], Iterable[RowBatch]]) -> Nearest:
        """Find rows that are nearer than all others: up to `most` for each text and the example."""
        known = number_labels(self.output)
        labels = [known[label] for label in query.labels]
        total = sum(count for _, count in self.indexed.values())
        matching = self.table.count(labels, self.stale) if labels else total
        in_sample = np.isin(self.state.sample_shards, np.fromiter(self.indexed, np.int64, len(self.indexed)))
        in_sample &= self.state.sample_labels.have_all(labels)

        def find(vector: Floats, count: int) -> NearRows:
            probes = self._count_probes(matching, total, count)
            found = self.table.find(vector, count, probes, self.stale, labels)
            return NearRows(found.shards, found.rows, found.embeddings, compare(found.embeddings, terms))

        def find_limit(rows: NearRows, similarities: NDArray[np.float32]) -> float:
            # What rows may have that were not found. None is left if all were.
            return -np.inf if len(rows.rows) >= matching else float(similarities.min(initial=np.inf))

        rows = NearRows.empty(self.sample.shape[1], compare(self.sample[:0], terms).shape[1])
        limits = []
        if terms.wanted:
            limits.append(np.inf)
            for text, vector in enumerate(terms.head.vectors[: terms.wanted]):
                found = find(vector, most)
                limits[0] = min(limits[0], find_limit(found, terms.head.logits(found.embeddings)[:, text]))
                rows = rows.add(found)
        if terms.example is not None:
            found = find(terms.example, most)
            limits.append(find_limit(found, found.similarities[:, len(limits)]))
            rows = rows.add(found)
        sample = compare(self.sample[in_sample], terms)
        counts: dict[int, LogitCounts] = {}
        if terms.wanted:
            counts[0] = count_logits(rows.similarities[:, 0], limits[0], sample[:, 0], matching)
        for column in range(len(limits), rows.similarities.shape[1]):
            unwanted = find(terms.head.vectors[terms.wanted + column - len(limits)], FOUND)
            logits = unwanted.similarities[:, column]
            counts[column] = count_logits(logits, find_limit(unwanted, logits), sample[:, column], matching)
        known_rows = rows.similarities if len(rows.rows) >= matching else sample
        nearest = Nearest(rows, np.asarray(limits, np.float32), known_rows, counts, matching, most)
        for batch in read():
            inside = np.flatnonzero(batch.labels.have_all(labels))
            similarities = compare(batch.embeddings[inside], terms)
            shards = np.full(len(inside), batch.shard, np.int64)
            nearest.add(NearRows(shards, batch.rows[inside], batch.embeddings[inside], similarities))
        nearest.rank(terms, find_training_share(self.output.model), cut=query.cutoff == "auto")
        return nearest

    def _count_probes(self, matching: int, total: int, count: int) -> int:
        """Return how many partitions are looked into for `count` rows, if `matching` rows of `total` have the labels.

        As many as were measured to be enough, for rows of which all can be found; more by as much as there are fewer.
        And as many as should have some times the rows that are asked for.
        """
        probes = max(self.state.about.probes, 1)
        if not matching:
            return probes
        partitions = count_partitions(max(self.state.about.trained, 1))
        enough = max(probes * total, _FILLED * count * partitions) / matching
        return max(probes, min(partitions, int(np.ceil(enough))))

    def _collect(self, query: Query, terms: Terms, nearest: Nearest) -> Results:
        output, rows, cutoff = self.output, nearest.rows, nearest.ranking.cutoff
        most = query.top + len(terms.shown)
        places = np.flatnonzero(nearest.kept)
        copies = np.zeros(len(places), np.int64)
        if query.fold:
            chosen, copies = fold_embeddings(rows.embeddings[places], most)
            places = places[chosen]
        places, copies = places[:most], copies[:most]
        ids = [f"{name_shard(rows.shards[place])}/{rows.rows[place]}" for place in places.tolist()]
        positions = output.find_positions(ids)
        results = np.asarray([position not in terms.shown for position in positions.tolist()], np.bool_)
        places, copies, positions = (one[results][: query.top] for one in (places, copies, positions))
        return Results(
            make_table(output, terms, positions, copies, rows.similarities[places]),
            positions,
            output.rows,
            nearest.searched,
            nearest.count_left_out(),
            None if cutoff is None else nearest.count_relevant(),
            None if cutoff is None else float(sigmoid(np.asarray(cutoff, np.float32))),
            float(sigmoid(np.asarray(nearest.counts[0].best, np.float32)))
            if terms.wanted and nearest.searched
            else None,
            nearest.more and (bool(query.without) or (cutoff is not None and nearest.within)),
        )
