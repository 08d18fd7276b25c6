"""Labels and scores of a request's images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from serve.context import RequestContext
from serve.http.json_response import LongList
from serve.label_sets.cache import EmbeddedLabelSet
from serve.schemas import LabelQuery
from siglip.heads import name_bands
from siglip.scoring import Floats, Selection, select, softmax

Result = TypeVar("Result")
STEP_PRODUCTS = 2**22
"""Multiplications in one step of scoring: about two milliseconds."""


class ScoredImages:
    """The selected labels of a request's images, best first.

    `labels` has a list for each image: its labels as `serve.schemas.LabelScore` describes them.
    """

    def __init__(self, selections: list[Selection], label_set: EmbeddedLabelSet, has_bands: bool) -> None:
        self._names = label_set.names
        self._accepts = label_set.accepts if has_bands else None
        self._thresholds = label_set.thresholds
        rows = (row for selection in selections for row in selection.rows())
        self.labels = [
            LongList(len(indices), 2, partial(self._list_labels, indices, scores)) for indices, scores in rows
        ]

    def _list_labels(self, indices: NDArray[np.intp], scores: Floats, start: int, stop: int) -> list[dict[str, Any]]:
        names = self._names
        chosen, kept = indices[start:stop].tolist(), scores[start:stop]
        found = [{"label": names[index], "score": score} for index, score in zip(chosen, kept, strict=True)]
        if self._accepts is not None:
            bands = name_bands(chosen, kept, self._accepts).tolist()
            # A request may lower the threshold. Bands are of scores that reach the label set's own.
            for one, band, reaches in zip(found, bands, kept >= self._thresholds[chosen], strict=True):
                if reaches:
                    one["band"] = band
        return found


async def score_labels(
    vectors: Floats, label_set: EmbeddedLabelSet, query: LabelQuery, context: RequestContext
) -> ScoredImages:
    """Score image embeddings (N, D), in the worker thread if that takes more than one step.

    These are the batch job's scores. Thresholds and bands of the label set hold for its sigmoid scores only, so softmax
    scores have neither. Raises `ApiError` and `serve.admission.batcher.Expired`.
    """
    use_softmax = query.activation == "softmax"
    thresholds = choose_thresholds(label_set, query)
    top_k = query.top_k or label_set.top_k

    def score(some: Floats) -> Selection:
        return select(compute_scores(some, label_set, query), thresholds, top_k)

    selections = await _run_steps(score, vectors, label_set, context)
    return ScoredImages(selections, label_set, has_bands=not use_softmax)


async def score_all_labels(
    vectors: Floats, label_set: EmbeddedLabelSet, query: LabelQuery, context: RequestContext
) -> Floats:
    """Score image embeddings (N, D) with all L labels, in the label set's order: float32 (N, L).

    Raises `ApiError` and `serve.admission.batcher.Expired`.
    """
    steps = await _run_steps(partial(compute_scores, label_set=label_set, query=query), vectors, label_set, context)
    return np.concatenate(steps)


def choose_thresholds(label_set: EmbeddedLabelSet, query: LabelQuery) -> Floats:
    """The scores that labels must reach, float32 (L,): the query's, or for sigmoid scores the label set's, or 0."""
    if query.threshold is not None:
        return np.full(len(label_set.names), query.threshold, np.float32)
    return np.zeros(len(label_set.names), np.float32) if query.activation == "softmax" else label_set.thresholds


def compute_scores(vectors: Floats, label_set: EmbeddedLabelSet, query: LabelQuery) -> Floats:
    """Scores of image embeddings (N, D) with all L labels: float32 (N, L)."""
    head = label_set.head
    return softmax(head.logits(vectors)) if query.activation == "softmax" else head.scores(vectors)


async def _run_steps(
    score: Callable[[Floats], Result],
    vectors: Floats,
    label_set: EmbeddedLabelSet,
    context: RequestContext,
) -> list[Result]:
    """Call `score` for all embeddings at once, or for some at a time in the worker thread."""
    if len(vectors) * label_set.head.vectors.size <= STEP_PRODUCTS:
        return [score(vectors)]
    rows = max(1, STEP_PRODUCTS // label_set.head.vectors.size)
    return await context.work_on(
        [partial(score, vectors[start : start + rows]) for start in range(0, len(vectors), rows)]
    )
