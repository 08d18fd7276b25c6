"""Labels and scores of a request's images."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.context import RequestContext
from serve.http.json_response import LongList
from serve.label_sets.cache import EmbeddedLabelSet
from serve.schemas import LabelQuery
from serve.worker import WorkerThread
from siglip.heads import name_bands
from siglip.scoring import Floats, Selection, select, softmax

STEP_PRODUCTS = 2**22
"""Multiplications in one step of scoring: about two milliseconds."""


class ScoredImages:
    """The selected labels of a request's images, best first.

    `labels` has a list for each image: its labels as `serve.schemas.LabelScore` describes them.
    """

    def __init__(self, selections: list[Selection], names: list[str], accepts: Floats | None) -> None:
        self._names = names
        self._accepts = accepts
        rows = (row for selection in selections for row in selection.rows())
        self.labels = [
            LongList(len(indices), 2, partial(self._list_labels, indices, scores)) for indices, scores in rows
        ]

    def _list_labels(self, indices: NDArray[np.intp], scores: Floats, start: int, stop: int) -> list[dict[str, Any]]:
        names = self._names
        chosen, kept = indices[start:stop].tolist(), scores[start:stop]
        found = [{"label": names[index], "score": score} for index, score in zip(chosen, kept, strict=True)]
        if self._accepts is not None:
            for one, band in zip(found, name_bands(chosen, kept, self._accepts).tolist(), strict=True):
                one["band"] = band
        return found


async def score_labels(
    vectors: Floats, label_set: EmbeddedLabelSet, query: LabelQuery, worker: WorkerThread, context: RequestContext
) -> ScoredImages:
    """Score image embeddings (N, D), in the worker thread if that takes more than one step.

    These are the batch job's scores. Thresholds and bands of the label set hold for its sigmoid scores only, so softmax
    scores have neither. Raises `ApiError` and `serve.admission.batcher.Expired`.
    """
    use_softmax = query.activation == "softmax"
    thresholds = np.zeros(len(label_set.names), np.float32) if use_softmax else label_set.thresholds
    if query.threshold is not None:
        thresholds = np.full(len(label_set.names), query.threshold, np.float32)
    top_k = query.top_k or label_set.top_k

    def score(start: int, stop: int) -> Selection:
        head, some = label_set.head, vectors[start:stop]
        return select(softmax(head.logits(some)) if use_softmax else head.scores(some), thresholds, top_k)

    if len(vectors) * label_set.head.vectors.size <= STEP_PRODUCTS:
        selections = [score(0, len(vectors))]
    else:
        rows = max(1, STEP_PRODUCTS // label_set.head.vectors.size)
        steps = [partial(score, start, start + rows) for start in range(0, len(vectors), rows)]
        selections = await worker.run(steps, context)
    return ScoredImages(selections, label_set.names, None if use_softmax else label_set.accepts)
