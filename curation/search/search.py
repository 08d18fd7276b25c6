"""Exact search: one scan over the embeddings of an output, at the speed of its store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curation.search.cutoff import LogitCounts, find_training_share
from curation.search.folding import fold_duplicates
from curation.search.query import Query, Terms, embed_query
from curation.search.ranking import Order, Ranking, sum_moments
from curation.tagged_output import ID, TaggedOutput, read_embeddings
from curation.where import Where
from siglip.config import ModelConfig
from siglip.scoring import Floats, multiply, sigmoid

SHOWN = (ID, "key", "source", "width", "height", "labels", "scores")
"""The columns of the output that a result has."""
_CHUNK = 1 << 20
"""Rows that are ranked at once."""


@dataclass(frozen=True)
class Results:
    """The result of a search.

    `table` has a row for each result, best first, with the columns of `SHOWN` and before them: `rank` from 1 on;
    `score`, the probability that the lowest of the texts belongs to the image, null without texts; `similarity`, the
    cosine with the example, null without one; `copies`, the number of near-duplicates that are folded into the result.
    `positions` are their positions in the output.

    `searched` rows satisfy the conditions. `left_out` of them show something unwanted. `relevant` of the others are
    within the cut-off, whose score is `cutoff`; both are None without a cut-off. `best` is the highest score of a text
    in the rows searched, None without a text.

    `estimated` says that `relevant` is an estimate, from a sample. `notes` are lines about the use of an index.
    """

    table: pa.Table
    positions: NDArray[np.int64]
    rows: int
    searched: int
    left_out: int
    relevant: int | None
    cutoff: float | None
    best: float | None
    estimated: bool = False
    notes: tuple[str, ...] = ()


def search_output(output: TaggedOutput, query: Query, model: ModelConfig | None = None) -> Results:
    """Search an output for images. Compares the query with every row, so that the result is exact.

    Equally good rows are in the order of the output. Memory holds one row group of embeddings and the results. The
    similarities of all rows are in a temporary file, 4 bytes for each row and each of: the texts, the example, each
    unwanted text.

    Raises `ConfigError` for a query that is not possible, `siglip.labels.LabelError` for texts that the model cannot
    read, `siglip.checkpoints.files.CheckpointError` for a model that cannot be used, and `storage.store.StoreError`.
    """
    where = query.check(output)
    terms = embed_query(query, output, model)
    return search_rows(output, query, terms, _read_rows(output, where), partial(fold_duplicates, output))


def search_rows(
    output: TaggedOutput,
    query: Query,
    terms: Terms,
    batches: Iterable[tuple[Floats, NDArray[np.bool_] | None]],
    fold: Callable[[NDArray[np.int64], int], tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> Results:
    """Search all rows of an output, wherever their embeddings are, as `search_output` does.

    `batches` are the embeddings in the order of the output, float32 (N, D), each with a mask of the rows that satisfy
    the conditions, None for all. `fold` folds rows at some positions, as `fold_duplicates` does.
    """
    with tempfile.TemporaryFile() as file:
        scan = _scan(batches, terms, file)
        ranking = _rank(scan, terms, query, find_training_share(output.model))
        return _collect(output, query, terms, scan, ranking, fold)


def _read_rows(output: TaggedOutput, where: Where | None) -> Iterator[tuple[Floats, NDArray[np.bool_] | None]]:
    needed = ["embedding", *(where.columns if where is not None else ())]
    for batch in output.batches(list(dict.fromkeys(needed))):
        yield read_embeddings(batch), None if where is None else where.keep(batch)


@dataclass
class _Scan:
    """The similarities of all rows, float32 (N, C), NaN where a row does not satisfy the conditions.

    The columns are the lowest wanted logit if there are texts, the cosine with the example if there is one, and the
    logit of each unwanted text. `counts` counts the logits of each column that has logits. `moments` are the sums of
    the columns that order rows, and of their squares, float64 (2, O).
    """

    similarities: NDArray[np.float32]
    counts: dict[int, LogitCounts]
    searched: int
    moments: NDArray[np.float64]

    def chunks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for start in range(0, len(self.similarities), _CHUNK):
            yield start, np.asarray(self.similarities[start : start + _CHUNK])


def _scan(batches: Iterable[tuple[Floats, NDArray[np.bool_] | None]], terms: Terms, file: Any) -> _Scan:
    columns = terms.ordering + len(terms.head.gain) - terms.wanted
    logit_columns = [*range(int(terms.wanted > 0)), *range(terms.ordering, columns)]
    counts = {column: LogitCounts() for column in logit_columns}
    moments = np.zeros((2, terms.ordering))
    rows = searched = 0
    for embeddings, mask in batches:
        found = compare(embeddings, terms)
        kept = np.ones(len(found), np.bool_) if mask is None else mask
        inside = found[kept]
        for column, counted in counts.items():
            counted.add(inside[:, column])
        moments += sum_moments(inside[:, : terms.ordering])[0]
        found[~kept] = np.nan
        file.write(found.tobytes())
        rows, searched = rows + len(found), searched + len(inside)
    file.flush()
    similarities = (
        np.memmap(file, np.float32, "r", shape=(rows, columns)) if rows else np.zeros((0, columns), np.float32)
    )
    return _Scan(similarities, counts, searched, moments)


def compare(embeddings: Floats, terms: Terms) -> NDArray[np.float32]:
    """Return the columns of `_Scan` for a query and embeddings of unit norm, float32 (N, D)."""
    logits = terms.head.logits(embeddings)
    columns = [logits[:, : terms.wanted].min(axis=1, keepdims=True)] if terms.wanted else []
    if terms.example is not None:
        columns.append(multiply(embeddings, terms.example[None]))
    return np.concatenate([*columns, logits[:, terms.wanted :]], axis=1, dtype=np.float32)


@dataclass
class _Best:
    """The order of the rows: `scores`, float64 (K,), and `positions`, int64 (K,), of the best, best first."""

    scores: NDArray[np.float64]
    positions: NDArray[np.int64]
    left_out: int
    relevant: int
    cutoff: float | None  # a logit


def _rank(scan: _Scan, terms: Terms, query: Query, training_share: float) -> _Best:
    by = Order.estimate(scan.moments, scan.searched)
    ranking = Ranking.make(terms, scan.counts, by, training_share, cut=query.cutoff == "auto")
    best = _Best(np.zeros(0), np.zeros(0, np.int64), 0, 0, ranking.cutoff)
    shown = np.fromiter(terms.shown, np.int64, len(terms.shown))
    # Folding may need more rows than results.
    most = query.top if not query.fold else max(1000, 20 * query.top)
    for start, chunk in scan.chunks():
        unwanted = ranking.find_unwanted(chunk)
        best.left_out += int(unwanted.sum())
        kept = ranking.find_relevant(chunk) & ~unwanted
        kept[shown[(shown >= start) & (shown < start + len(chunk))] - start] = False
        best.relevant += int(kept.sum())
        places = np.flatnonzero(kept)
        scores = np.concatenate([best.scores, ranking.order(chunk[places])])
        positions = np.concatenate([best.positions, places + start])
        order = np.lexsort((positions, -scores))[:most]
        best.scores, best.positions = scores[order], positions[order]
    return best


def _collect(
    output: TaggedOutput,
    query: Query,
    terms: Terms,
    scan: _Scan,
    ranking: _Best,
    fold: Callable[[NDArray[np.int64], int], tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> Results:
    positions, copies = ranking.positions, np.zeros(len(ranking.positions), np.int64)
    if query.fold:
        kept, copies = fold(positions, query.top)
        positions = positions[kept]
    positions, copies = positions[: query.top], copies[: query.top]
    own = make_table(output, terms, positions, copies, np.asarray(scan.similarities[positions]))
    best = scan.counts[0].best if terms.wanted and scan.searched else None
    return Results(
        own,
        positions,
        len(scan.similarities),
        scan.searched,
        ranking.left_out,
        None if ranking.cutoff is None else ranking.relevant,
        None if ranking.cutoff is None else float(sigmoid(np.asarray(ranking.cutoff, np.float32))),
        None if best is None else float(sigmoid(np.asarray(best, np.float32))),
    )


def make_table(
    output: TaggedOutput,
    terms: Terms,
    positions: NDArray[np.int64],
    copies: NDArray[np.int64],
    similarities: NDArray[np.float32],
) -> pa.Table:
    """Return the table of `Results` for rows at some positions, with the columns of `compare`, float32 (K, C)."""
    texts, count = terms.wanted > 0, len(positions)
    score = sigmoid(similarities[:, 0]) if texts else None
    similarity = similarities[:, int(texts)] if terms.example is not None else None
    own = pa.table(
        {
            "rank": np.arange(1, count + 1),
            "score": pa.nulls(count, pa.float32()) if score is None else pa.array(score, pa.float32()),
            "similarity": pa.nulls(count, pa.float32()) if similarity is None else pa.array(similarity, pa.float32()),
            "copies": copies,
        }
    )
    found = output.take(positions, SHOWN)
    for name in SHOWN:
        own = own.append_column(name, found[name])
    return own
