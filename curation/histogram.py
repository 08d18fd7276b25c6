"""Scores of many images and labels at once: sorted into bins by their logit, and ranked within what they are of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from siglip.scoring import Floats


def bin_scores(scores: Floats, edges: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The bin of each score (N, L), and how many of each label's scores are in each: (N, L) and (L, bins).

    `edges` are logits; the first and the last bin hold what is beyond them. By the logit of the score and not of the
    model, so that calibrated scores and those of groups fit too.
    """
    bounds = (1 / (1 + np.exp(-edges))).astype(np.float32)
    bins = np.searchsorted(bounds, scores.reshape(-1), side="right").reshape(scores.shape)
    labels, number = scores.shape[1], len(edges) + 1
    counts = np.bincount((bins + np.arange(labels) * number).reshape(-1), minlength=labels * number)
    return bins, counts.reshape(labels, number)


def rank_within(ordered: NDArray[np.int64]) -> NDArray[np.int64]:
    """For values in order, how many of the same stand before each."""
    return np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
