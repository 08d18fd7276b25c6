"""Search with an index: the nearest images from the index, and from an exact scan of those that it does not have yet.

An index answers the queries that one vector orders: one text, or examples. What needs the similarities of all images
is left to the exact search, and a note says so: several texts, texts with examples, conditions and labels, `--not`.

The cut-off of a text needs the scores of all images too, but only as an estimate of a share. The images with the
highest scores, which decide, are found by the index. Those with lower ones are represented by the sample of the index,
16,384 images drawn at random, each of which stands for as many as there are for each in the sample. So the number of
relevant images is counted if the cut-off is among the found ones, and else estimated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curation.index.state import IndexState, list_shards, read_index_state
from curation.index.table import IndexTable, name_shard, number_shard
from curation.search.cutoff import LogitCounts, find_training_share
from curation.search.folding import fold_embeddings
from curation.search.query import Query, Terms, embed_query
from curation.search.search import Results, compare, make_table, search_output
from curation.tagged_output import TaggedOutput, read_embeddings, read_vectors
from siglip.config import ModelConfig
from siglip.scoring import Floats, sigmoid
from storage.settings import ConfigError

FOUND = 1000
"""The fewest rows that are asked for, however few are shown, where a cut-off is estimated from them."""

MOST = 2000
"""The most results: their embeddings are in memory, and with --fold those of twenty times as many rows."""


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
    table = IndexTable.open(output, state.about.version)
    terms = embed_query(query, output, model)
    wanted = list_shards(output)
    indexed = {shard: found for shard, found in state.list_shards().items() if wanted.get(shard) == found}
    stale = [shard for shard in state.shards.tolist() if shard not in indexed]
    missing = {name_shard(shard) for shard in wanted if shard not in indexed}
    estimates = bool(terms.wanted) and query.cutoff == "auto"
    # Folding may need more rows than results, and the examples themselves are no results.
    most = max(FOUND if estimates else 0, (20 if query.fold else 4) * query.top) + len(terms.shown)
    vector = terms.head.vectors[0] if terms.wanted else terms.example
    assert vector is not None
    found = table.find(vector, most, max(state.about.probes, 1), stale)
    counts = LogitCounts()
    rows = _Rows(found.shards, found.rows, found.embeddings, compare(found.embeddings, terms)[:, :1])
    if terms.wanted:
        counts.add(rows.similarities)
    if estimates:
        _add_sample(counts, state, terms, indexed, rows)
    if missing:
        rows = _scan_missing(output, terms, missing, rows, counts, most)
    results = _collect(output, query, terms, rows, counts)
    behind = sum(wanted[number_shard(shard)][1] for shard in missing)
    note = f"{behind:,} images are not in the index yet, and were compared besides"
    return replace(results, notes=(note,)) if missing else results


def why_exact(query: Query) -> str:
    """Return why an index cannot answer a query, or an empty text."""
    if query.without:
        return "--not needs the scores of all of them"
    if query.where is not None or query.labels:
        return "a condition holds for other images than those that it finds"
    if query.top > MOST:
        return f"it finds up to {MOST:,}"
    if len(set(query.texts)) > 1:
        return "it finds the images of one text"
    if query.texts and (query.images or query.like):
        return "it finds the images of a text or of examples, and not of both"
    return ""


@dataclass
class _Rows:
    """Rows with their embeddings, float32 (K, D), and the column of `compare`, float32 (K, 1), best first."""

    shards: NDArray[np.int64]
    rows: NDArray[np.int64]
    embeddings: Floats
    similarities: NDArray[np.float32]

    def best(self, other: _Rows, most: int) -> _Rows:
        """Return the best of these and of others."""
        joined = [
            np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("shards", "rows", "embeddings", "similarities")
        ]
        order = np.lexsort((joined[1], joined[0], -joined[3][:, 0]))[:most]
        return _Rows(*(one[order] for one in joined))


def _add_sample(
    counts: LogitCounts, state: IndexState, terms: Terms, indexed: Mapping[int, tuple[int, int]], rows: _Rows
) -> None:
    """Count the logits of the rows of the index that were not found, as the sample has them."""
    left = sum(count for _, count in indexed.values()) - len(rows.rows)
    if left <= 0 or not len(rows.rows):
        return
    width = state.sample.shape[1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(state.sample.reshape(-1)), width)
    inside = np.isin(state.sample_shards, np.fromiter(indexed, np.int64, len(indexed)))
    logits = compare(read_vectors(column)[inside], terms)[:, 0]
    logits = logits[logits < rows.similarities.min()]
    if len(logits):
        counts.add(logits, left / len(logits))


def _scan_missing(
    output: TaggedOutput, terms: Terms, missing: set[str], rows: _Rows, counts: LogitCounts, most: int
) -> _Rows:
    for shard, _, batch in output.shard_batches(missing, ["row", "embedding"]):
        embeddings = read_embeddings(batch)
        similarities = compare(embeddings, terms)[:, :1]
        if terms.wanted:
            counts.add(similarities)
        shards = np.full(len(batch), number_shard(shard), np.int64)
        rows = rows.best(_Rows(shards, batch["row"].to_numpy().astype(np.int64), embeddings, similarities), most)
    return rows


def _collect(output: TaggedOutput, query: Query, terms: Terms, rows: _Rows, counts: LogitCounts) -> Results:
    cutoff = None
    relevant, estimated = len(rows.rows), False
    kept = np.ones(len(rows.rows), np.bool_)
    if terms.wanted and query.cutoff == "auto":
        cutoff = counts.find_cutoff(find_training_share(output.model))
        kept = rows.similarities[:, 0] > cutoff
        relevant = int(kept.sum())
        estimated = bool(kept.all()) and len(kept) < output.rows
        if estimated:
            relevant = max(relevant, round(counts.count_above(cutoff)))
    places = np.flatnonzero(kept)
    copies = np.zeros(len(places), np.int64)
    if query.fold:
        chosen, copies = fold_embeddings(rows.embeddings[places], query.top + len(terms.shown))
        places = places[chosen]
    places, copies = places[: query.top + len(terms.shown)], copies[: query.top + len(terms.shown)]
    ids = [f"{name_shard(rows.shards[place])}/{rows.rows[place]}" for place in places.tolist()]
    positions = output.find_positions(ids)
    results = np.asarray([position not in terms.shown for position in positions.tolist()], np.bool_)
    places, copies, positions = (one[results][: query.top] for one in (places, copies, positions))
    return Results(
        make_table(output, terms, positions, copies, rows.similarities[places]),
        positions,
        output.rows,
        output.rows,
        0,
        None if cutoff is None else relevant,
        None if cutoff is None else float(sigmoid(np.asarray(cutoff, np.float32))),
        float(sigmoid(np.asarray(counts.best, np.float32))) if terms.wanted else None,
        estimated,
    )
