"""Where the relevant images of a query end: a cut-off that depends on the query and on the images that are searched.

SigLIP's sigmoid is the probability that a text belongs to an image, among the pairs of its training: there, each text
belonged to one image of a batch. In a search the share of images to which the text belongs is another one for each
query: a third of the photos show people, one in ten thousand shows a unicorn, and none does in most outputs. So the
same probability means a hit for one query and noise for another, and no fixed cut-off is right for both.

The share is estimated from all scores of the query, by maximum likelihood. With l(i) the logit of image i, the image is
exp(l(i)) * (1 - r) / r times as likely if the text belongs to it, r being the share in training. The estimate p is the
share that makes the scores most likely, that is, the p from 0 to 1 where the sum of log(1 - p + p * ratio(i)) is
largest. It is concave in p, so there is one. This is the adjustment of a classifier to new prior probabilities by
Saerens, Latinne and Decaestecker (Neural Computation 14, 2002), whose iteration converges to the same p. An image is
relevant if the text belongs to it with more than even odds under p instead of r.

The estimate is made as if `IRRELEVANT` more images were there, to which the text does not belong. If it is zero,
nothing is relevant, except images whose score is at least `SURE` without any adjustment. So "unicorn" finds nothing
among holiday photos, however they are ordered by it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

TRAINING_SHARE = 1 / 32_768
"""The share of images to which a text belongs in training: one of a batch, which had 32,768 images for the published
checkpoints of SigLIP (Zhai et al. 2023, section 4) and of SigLIP 2 (Tschannen et al. 2025, section 2)."""
TINY_SHARE = 1 / 80
"""That of the checkpoint that ships with Sightline: it was trained against 80 prompts at a time."""
SURE = 0.95
"""Images with at least this score are relevant, whatever the estimate is, in which one of a million has no weight."""
IRRELEVANT = 100
"""Irrelevant images that are counted beside those searched. Without them, the estimate of a few images is one of
nothing or all."""
_LOWEST, _BIN = -160.0, 1 / 64
_BINS = round(2 * -_LOWEST / _BIN)


class LogitCounts:
    """The logits of a query's images, counted in bins of 1/64. Memory does not depend on the number of images."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS)
        self.best = -math.inf
        """The highest logit so far."""

    def add(self, logits: NDArray[np.floating], weight: float = 1.0) -> None:
        """Count logits, of any shape. They must be finite. Each stands for `weight` images."""
        if logits.size:
            self.best = max(self.best, float(logits.max()))
            bins = ((logits.ravel().astype(np.float64) - _LOWEST) / _BIN).astype(np.int64)
            self._counts += weight * np.bincount(np.clip(bins, 0, _BINS - 1), minlength=_BINS)

    def count_above(self, logit: float) -> float:
        """Return how many images have a higher logit, to a bin."""
        if logit == -math.inf:
            return float(self._counts.sum())
        return float(self._counts[max(0, math.ceil((logit - _LOWEST) / _BIN)) :].sum())

    def estimate_share(self, training_share: float) -> float:
        """Return the estimated share of images to which the text belongs, from 0 to 1."""
        used = np.flatnonzero(self._counts)
        if not len(used):
            return 0.0
        logits = _LOWEST + (used + 0.5) * _BIN
        # The ratios of the likelihoods, less 1.
        excess = np.append(np.expm1(logits - _logit(training_share)), -1.0)
        weights = np.append(self._counts[used], IRRELEVANT)

        def slope(share: float) -> float:
            return float(np.sum(weights * (excess / (1 + share * excess))))

        if slope(0.0) <= 0:
            return 0.0
        low, high = 0.0, 1.0 - 1e-12
        if slope(high) >= 0:
            return 1.0
        for _ in range(200):  # halves, until the share has 12 digits: it may be very small
            middle = math.sqrt(low * high) if low else high * 1e-3
            if slope(middle) > 0:
                low = middle
            else:
                high = middle
            if high - low <= 1e-12 * high:
                break
        return high

    def find_cutoff(self, training_share: float) -> float:
        """Return the logit above which images are relevant. It is never above that of `SURE`."""
        share = self.estimate_share(training_share)
        if share <= 0:
            return _logit(SURE)
        if share >= 1:
            return -math.inf
        return min(_logit(SURE), _logit(training_share) - _logit(share))


def find_training_share(source: str) -> float:
    """Return the share for a model's source, as `model.source` of a configuration names it."""
    return TINY_SHARE if source == "tiny" else TRAINING_SHARE


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
