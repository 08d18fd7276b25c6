"""Precision-recall curves: what other thresholds than a label's own would give, with a band of intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curation.estimates.cells import CellTable, ThresholdRegions, count_cells
from curation.estimates.confidence import UNKNOWN, Counts, Estimate, estimate_share
from curation.estimates.figures import estimate_recall
from curation.quality.truth import Truth
from curation.sampling.sample import assume_threshold
from curation.tagged_output import TaggedOutput
from siglip.scoring import Floats

POINTS = 12
"""The number of thresholds of a curve, besides the label's own and its `accept`."""
_OFFSETS = np.arange(-4.0, 12.01, 0.25)
"""The thresholds among which a curve's are chosen, in logits from the label's own threshold."""
_OWN = int(np.flatnonzero(_OFFSETS == 0)[0])


@dataclass(frozen=True)
class CurvePoint:
    """A threshold, and what it would give: the number of `images` that reach it, and how many `answers` are about them.

    `top_k` plays no part: the images count whose score reaches the threshold. The intervals are pointwise: each holds
    for its own threshold, and not for all thresholds at once.
    """

    threshold: float
    images: int
    answers: int
    precision: Estimate
    recall: Estimate


def trace_curves(
    output: TaggedOutput, truth: Truth, labels: NDArray[np.int64], wrong_answers: float
) -> list[tuple[CurvePoint, ...]]:
    """Trace the curve of each of the labels with these indices, in one pass over the output.

    The points are in the order of their thresholds: the label's own, its `accept` score, and up to `POINTS` more, from
    4 logits below its own to the highest score. They are chosen by scores alone, so that the intervals hold. A figure
    that the answers cannot tell is not known. The answers must be a sample (`truth.designs`).
    """
    if not len(labels):
        return []
    thresholds = np.stack([_list_thresholds(output, label) for label in labels.tolist()])
    tables = count_cells(output, truth, labels, ThresholdRegions(thresholds))
    curves = []
    for label, tried, table in zip(labels.tolist(), thresholds, tables, strict=True):
        accept = output.labels.names[label].accept
        fixed = [_own_threshold(output, label), *([] if accept is None else [accept])]
        chosen = _choose(tried, table.size.sum(axis=0), np.asarray(fixed, np.float32))
        curves.append(tuple(_measure(tried, table, index, wrong_answers) for index in chosen))
    return curves


def _own_threshold(output: TaggedOutput, label: int) -> float:
    """The threshold from which the offsets are counted: the label's own, or the assumed one if it has none."""
    return assume_threshold(output.labels.thresholds()[label])


def _list_thresholds(output: TaggedOutput, label: int) -> Floats:
    """Increasing thresholds, float32 (T,), among them exactly the label's own and its `accept`."""
    own, accept = _own_threshold(output, label), output.labels.names[label].accept
    steps = 1 / (1 + np.exp(-(_OFFSETS + math.log(own / (1 - own)))))
    steps[_OWN] = own
    return np.sort(np.append(steps, own if accept is None else accept).astype(np.float32))


def _choose(tried: Floats, sizes: Counts, fixed: Floats) -> list[int]:
    """The indices of a curve's thresholds: those of `fixed`, and some at equal distances up to the highest score.

    `sizes` (T + 1,) are the images of each range between the thresholds. No threshold is chosen that no image reaches.
    """
    reached = np.flatnonzero(np.cumsum(sizes[::-1])[::-1][1:])
    if not len(reached):
        return []
    even = np.linspace(reached[0], reached[-1], POINTS).round().astype(np.int64)
    exact = np.searchsorted(tried, fixed)  # of equal thresholds the first
    first = np.searchsorted(tried, tried[np.union1d(even, exact[np.isin(exact, reached)])])
    return [int(index) for index in np.unique(first)]


def _measure(tried: Floats, table: CellTable, index: int, wrong_answers: float) -> CurvePoint:
    last = table.size.shape[1]
    above, below = table.join_regions(index + 1, last), table.join_regions(0, index + 1)
    precision = recall = UNKNOWN
    if not math.isnan(above.estimate_right()):  # otherwise known without a computation that takes long
        precision = estimate_share(above, wrong_answers)
        if not math.isnan(below.estimate_right()):
            recall = estimate_recall(above, below, wrong_answers)
    threshold = float(str(tried[index]))  # the shortest number that is this float32
    return CurvePoint(threshold, above.total, int(above.drawn.sum()), precision, recall)
