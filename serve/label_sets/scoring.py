"""Labels and scores of a request's images."""

from __future__ import annotations

from itertools import repeat

import numpy as np

from serve.label_sets.cache import EmbeddedLabelSet
from serve.schemas import LabelQuery, LabelScore
from siglip.heads import name_bands
from siglip.scoring import Floats, select, softmax


def score_labels(vectors: Floats, label_set: EmbeddedLabelSet, query: LabelQuery) -> list[list[LabelScore]]:
    """Score image embeddings (N, D): the labels and scores of each image, best first.

    These are the batch job's scores. Thresholds and bands of the label set hold for its sigmoid scores only, so softmax
    scores have neither.
    """
    use_softmax = query.activation == "softmax"
    scores = softmax(label_set.head.logits(vectors)) if use_softmax else label_set.head.scores(vectors)
    thresholds = np.zeros(len(label_set.names), np.float32) if use_softmax else label_set.thresholds
    if query.threshold is not None:
        thresholds = np.full(len(label_set.names), query.threshold, np.float32)
    with_bands = label_set.has_bands and not use_softmax
    images = []
    for indices, kept in select(scores, thresholds, query.top_k or label_set.labels.top_k).rows():
        bands = name_bands(indices, kept, label_set.labels).tolist() if with_bands else repeat(None)
        rows = zip(indices, kept.tolist(), bands, strict=False)
        images.append([LabelScore(label=label_set.names[i], score=score, band=band) for i, score, band in rows])
    return images
