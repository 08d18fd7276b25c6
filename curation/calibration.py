"""From answers to thresholds: which score means which precision, label by label, and what is left to people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from curation.evaluation import Doubles, group_answers
from curation.tagged_output import TaggedOutput
from curation.truth import Truth
from siglip.heads import Head, accept_bars, build_head
from siglip.labels import Calibration, LabelSet

JUDGED, CHOSEN = 1.6448536269514722, 2.3263478740408408
"""One-sided normal quantiles. A precision counts as reached at the 95 % bound of answers that chose no threshold. A
threshold is chosen at the 99 % bound of its own, because the lowest of many that pass is by luck among them: in 400
simulated splits it then held its precision in 95 % of those where it was reached, and in 86 % when chosen at the 95 %
bound. An accepted set without an error is taken at that one."""
FOLDS = 5
PRIOR = 2.0
"""Standard deviation of a label's bias about that of all labels together, in logits, and of its log scale times four:
with few answers a label's calibration is that of all."""


@dataclass(frozen=True)
class LabelCalibration:
    """What was found for a label.

    `calibration` is of its logit. `accept` is the score from which its precision is the wanted one, None where that is
    not shown: then `missing` is about how many more accepted answers would show it, or None if no threshold would.
    `review` is the score above which the wanted share of the right images lies. `precision` is that of `accepted`
    answers which chose no threshold, weighted, and `bound` its lower bound; `recall` is the share of the right ones
    that are accepted.
    """

    label: str
    answers: int
    right: int
    calibration: Calibration
    accept: float | None
    review: float
    accepted: int
    precision: float
    bound: float
    recall: float
    missing: int | None = None


@dataclass(frozen=True)
class Workload:
    """A label's share of the whole output: images that need nobody, and images to look at."""

    accepted: int
    review: int


def calibrate(
    output: TaggedOutput, truth: Truth, target: float | None = 0.9, recall: float = 0.95, seed: int = 0
) -> list[LabelCalibration]:
    """For each label of the output's set a calibration, and the score from which its precision is `target`.

    Without a target, the score with the best F1. Answers are cut into folds by image; each fold's accepted answers are
    counted at a threshold that the others chose, so that no answer both chooses and judges. Bounds are Wilson's (1927);
    with weights, of Kish's effective number of answers. Precision is of the images that the weights stand for: other
    images than the output's may be harder. A label in a group is scaled as if it stood alone, before the group's
    softmax, and its threshold is on the score that comes out. Calibrations that the set has are replaced.
    """
    names = output.labels.label_names()
    logits = _strip(output).logits(truth.embeddings)[truth.image, truth.label].astype(np.float64)
    groups = group_answers(truth, len(names))
    pooled = fit_platt(logits, truth.right, effective(truth.weight), (1.0, 0.0), math.inf)
    fitted = []
    for asked in groups:
        scale, bias = fit_platt(logits[asked], truth.right[asked], effective(truth.weight[asked]), pooled, PRIOR)
        fitted.append(Calibration(scale=scale, bias=bias))
    labels = _recalibrate(output.labels, fitted)
    scores = _head(output, labels).scores(truth.embeddings)[truth.image, truth.label].astype(np.float64)
    folds = np.random.default_rng(seed).permutation(len(truth.positions))[truth.image] % FOLDS
    return [
        _calibrate_label(
            name,
            calibration,
            scores[asked],
            truth.right[asked],
            truth.weight[asked],
            folds[asked],
            target,
            recall,
        )
        for name, calibration, asked in zip(names, fitted, groups, strict=True)
    ]


def make_label_set(output: TaggedOutput, found: Sequence[LabelCalibration]) -> LabelSet:
    """The output's label set with what was found: calibrations, `accept`, and `review` as the threshold."""
    names = [
        label.model_copy(update={"calibration": one.calibration, "threshold": one.review, "accept": one.accept})
        for label, one in zip(output.labels.names, found, strict=True)
    ]
    return LabelSet.model_validate(output.labels.model_copy(update={"names": tuple(names)}).model_dump())


def count_workload(output: TaggedOutput, labels: LabelSet) -> list[Workload]:
    """For each label how many of all the output's images it accepts and leaves to people: one pass."""
    head = _head(output, labels)
    bars = np.asarray(labels.thresholds(), np.float32)
    sure = accept_bars(labels)
    accepted = np.zeros(len(bars), np.int64)
    given = np.zeros(len(bars), np.int64)
    for scores in output.scores(head):
        accepted += (scores >= sure).sum(axis=0)
        given += (scores >= bars).sum(axis=0)
    return [Workload(int(one), int(every - one)) for one, every in zip(accepted, given, strict=True)]


def fit_platt(
    logits: Doubles, right: NDArray[np.bool_], weight: Doubles, prior: tuple[float, float], deviation: float
) -> tuple[float, float]:
    """Scale and bias of a logit that make its sigmoid a probability (Platt 1999), near a prior.

    The largest posterior of a logistic regression whose bias has a normal prior with this standard deviation and whose
    log scale has one with a quarter of it; on logits, because a sigmoid of a sigmoid has no room for the tails. Without
    answers of both kinds and without a prior it is 1 and 0.
    """
    from scipy.optimize import minimize

    if not len(logits) or (math.isinf(deviation) and (right.all() or not right.any())):
        return prior
    signs = np.where(right, 1.0, -1.0)
    centre = np.array([math.log(prior[0]), prior[1]])
    spread = np.array([deviation / 4, deviation])

    def loss(point: Doubles) -> tuple[float, Doubles]:
        scale = math.exp(point[0])
        margin = signs * (scale * logits + point[1])
        lost = np.logaddexp(0, -margin)
        slope = -signs * weight / (1 + np.exp(np.minimum(margin, 500)))
        off = (point - centre) / spread
        gradient = np.array([(slope * scale * logits).sum(), slope.sum()]) + off / spread
        return float((weight * lost).sum() + (off**2).sum() / 2), gradient

    bounds = [(centre[0] - 5, centre[0] + 5), (-100, 100)]
    found = minimize(loss, centre, jac=True, method="L-BFGS-B", bounds=bounds)
    return math.exp(found.x[0]), float(found.x[1])


def effective(weight: Doubles) -> Doubles:
    """Weights that add up to Kish's effective number of answers, (sum w)^2 / sum w^2."""
    return np.asarray(weight * weight.sum() / np.square(weight).sum() if len(weight) else weight, np.float64)


def wilson_bound(share: float | Doubles, count: float | Doubles, quantile: float) -> Doubles:
    """Wilson's lower bound (1927) of a share seen in `count` answers; 0 of none."""
    share, count = np.asarray(share, np.float64), np.asarray(count, np.float64)
    square = quantile**2
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = share + square / (2 * count)
        spread = quantile * np.sqrt(np.maximum(share * (1 - share), 0) / count + square / (4 * count**2))
        bound = (centre - spread) / (1 + square / count)
    return np.where(count > 0, bound, 0.0)


def count_needed(share: float, target: float) -> int | None:
    """The answers whose bound reaches the target if this share of them is right; None if none would do."""
    if share <= target:
        return None
    high = 1
    while wilson_bound(share, high, JUDGED) < target and high < 10**9:
        high *= 2
    low = high // 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if wilson_bound(share, middle, JUDGED) >= target else (middle + 1, high)
    return low


@dataclass(frozen=True)
class _Curve:
    """What is accepted at each threshold, highest first: its weight, its effective number, its precision."""

    thresholds: Doubles
    counts: Doubles
    precision: Doubles
    recall: Doubles

    @classmethod
    def of(cls, scores: Doubles, right: NDArray[np.bool_], weight: Doubles) -> _Curve:
        order = np.argsort(-scores, kind="stable")
        ordered, weight, right = scores[order], weight[order], right[order]
        last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) if len(ordered) else np.zeros(0, np.intp)
        total, squares = np.cumsum(weight)[last], np.cumsum(weight**2)[last]
        hits = np.cumsum(weight * right)[last]
        every = hits[-1] if len(hits) and hits[-1] else math.nan
        return cls(ordered[last], total**2 / squares, hits / total, hits / every)

    def choose(self, target: float | None, share: float = 1.0) -> int | None:
        """The lowest threshold that is fit for the target, or the one with the best F1. Its place, if there is one.

        `share` is how much of the answers these are: what all of them would show is what counts.
        """
        if not len(self.thresholds) or math.isnan(self.recall[0]):
            return None
        if target is None:
            return int(np.argmax(2 * self.precision * self.recall / (self.precision + self.recall + 1e-12)))
        faultless = self.precision >= 1 - 1e-12
        bound = np.where(
            faultless,
            wilson_bound(self.precision, self.counts / share, JUDGED),
            wilson_bound(self.precision, self.counts / share, CHOSEN),
        )
        fit = np.flatnonzero(bound >= target)
        return int(fit[-1]) if len(fit) else None


def _calibrate_label(
    name: str,
    calibration: Calibration,
    scores: Doubles,
    right: NDArray[np.bool_],
    weight: Doubles,
    folds: NDArray[np.int64],
    target: float | None,
    recall: float,
) -> LabelCalibration:
    accepted = np.zeros(len(scores), bool)
    for fold in range(FOLDS):
        held = folds == fold
        curve = _Curve.of(scores[~held], right[~held], weight[~held])
        place = curve.choose(target, (FOLDS - 1) / FOLDS)
        if place is not None:
            accepted[held] = scores[held] >= curve.thresholds[place]
    held_out = _Curve.of(np.zeros(accepted.sum()), right[accepted], weight[accepted])
    count = float(held_out.counts[0]) if accepted.any() else 0.0
    precision = float(held_out.precision[0]) if accepted.any() else math.nan
    bound = float(wilson_bound(precision, count, JUDGED)) if accepted.any() else 0.0
    whole = _Curve.of(scores, right, weight)
    place = whole.choose(target)
    reached = place is not None and (target is None or bound >= target)
    accept = _round_down(whole.thresholds[place]) if reached and place is not None else None
    positives = weight[right]
    found = LabelCalibration(
        name,
        len(scores),
        int(right.sum()),
        calibration,
        accept,
        min(_review(scores[right], positives, recall), 1.0 if accept is None else accept),
        int(accepted.sum()),
        precision,
        bound,
        float(positives[scores[right] >= accept].sum() / positives.sum())
        if accept is not None and right.any()
        else 0.0,
    )
    return found if reached or target is None else replace(found, missing=_count_missing(whole, target))


def _count_missing(curve: _Curve, target: float) -> int | None:
    """How many more accepted answers the target would take, at the threshold where it takes fewest."""
    needed = [
        count - int(seen)
        for share, seen in zip(curve.precision, curve.counts, strict=True)
        if (count := count_needed(float(share), target)) is not None
    ]
    return max(1, min(needed)) if needed else None


def _review(scores: Doubles, weight: Doubles, recall: float) -> float:
    """The score above which this share of the right ones lies; 0 where none is known to be right."""
    if not len(scores):
        return 0.0
    order = np.argsort(-scores, kind="stable")
    reached = np.searchsorted(np.cumsum(weight[order]), recall * weight.sum() * (1 - 1e-9))
    return _round_down(scores[order][min(reached, len(scores) - 1)])


def _round_down(score: float) -> float:
    """To five significant digits, and never above: what is at the threshold stays in, and one in a million is not 0."""
    if score <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(score)) - 4)
    return min(float(score), float(f"{math.floor(score / unit) * unit:.5g}"))


def _strip(output: TaggedOutput) -> Head:
    """The output's head without calibrations: Platt's scale and bias are of the checkpoint's logit."""
    return _head(output, _recalibrate(output.labels, [None] * len(output.labels.names)))


def _head(output: TaggedOutput, labels: LabelSet) -> Head:
    return build_head(labels, output.head.vectors, output.table.scale, output.weights)


def _recalibrate(labels: LabelSet, fitted: Sequence[Calibration | None]) -> LabelSet:
    names = tuple(
        label.model_copy(update={"calibration": calibration})
        for label, calibration in zip(labels.names, fitted, strict=True)
    )
    return labels.model_copy(update={"names": names})
