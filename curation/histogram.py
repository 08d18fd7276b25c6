"""Histograms of scores on a logit axis, and ranks within groups of equal values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from siglip.scoring import Floats


def bin_scores(scores: Floats, edges: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Assign each score to a bin, and count each label's scores in each bin.

    `scores` is float32 (N, L); `edges` are E increasing logits. Returns the bin of each score, int64 (N, L), and each
    label's histogram, int64 (L, E + 1). The first bin holds the scores below all edges, the last bin those above.

    The logit is that of the score, log(p / (1 - p)), and not the model's logit, so that calibrated scores and scores of
    a group (softmax) can be binned too.
    """
    bounds = (1 / (1 + np.exp(-edges))).astype(np.float32)
    bins = np.searchsorted(bounds, scores.reshape(-1), side="right").reshape(scores.shape)
    labels, number = scores.shape[1], len(edges) + 1
    counts = np.bincount((bins + np.arange(labels) * number).reshape(-1), minlength=labels * number)
    return bins, counts.reshape(labels, number)


def rank_within_groups(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the members of each group from 0. `groups` (N,) holds sorted group numbers: [3, 3, 5] gives [0, 1, 0]."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)
