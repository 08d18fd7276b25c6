"""Calibration: turn scores into probabilities, and find each label's accept and review thresholds, from answers.

An image whose score reaches a label's `accept` threshold is accepted without a person. An image between the review
threshold and `accept` is left for a person to review.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from curation.quality.evaluation import Doubles
from curation.quality.truth import Truth, group_answers
from curation.tagged_output import TaggedOutput
from siglip.heads import LinearHead, accept_thresholds, build_head
from siglip.labels import Calibration, LabelSet

JUDGE_QUANTILE, CHOOSE_QUANTILE = 1.6448536269514722, 2.3263478740408408
"""One-sided normal quantiles, for 95 % and 99 %.

A label counts as calibrated when the 95 % lower bound of its precision on held-out answers reaches the target. A
threshold is chosen at the 99 % lower bound of the answers that choose it, because the lowest of many passing thresholds
may pass by chance. In 400 simulated splits, a threshold chosen at the 99 % bound kept its precision in 95 % of the
splits where one was found, and a threshold chosen at the 95 % bound in 86 %. A threshold above which all answers are
right is chosen at the 95 % bound.
"""
FOLDS = 5
PRIOR_DEVIATION = 2.0
"""Standard deviation of the prior of a label's bias, in logits, and four times that of its log scale.

The prior's mean is the calibration of all labels together, so that a label with few answers has about that calibration.
"""


@dataclass(frozen=True)
class LabelCalibration:
    """The calibration and the thresholds of one label, with the figures that they rest on.

    `answers` is the number of answers about the label, `right` the number of those that say right. `calibration` is
    applied to the label's logit. `accept` is the lowest score from which the target precision is shown, or None when
    no score is; `answers_needed` is then about how many more accepted answers would show it, or None when no number is
    enough.
    `review` is the review threshold: the wanted share of the right images score at least that.

    `accepted`, `precision` and `bound` come from cross-validation: the number of held-out answers that are accepted,
    their weighted precision, and its one-sided 95 % lower bound. `recall` is the weighted share of the right answers
    that score at least `accept`; the same answers chose the threshold.
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
    answers_needed: int | None = None


@dataclass(frozen=True)
class Workload:
    """The number of images of the whole output that a label accepts, and that it leaves to be reviewed."""

    accepted: int
    review: int


def calibrate(
    output: TaggedOutput, truth: Truth, target: float | None = 0.9, recall: float = 0.95, seed: int = 0
) -> list[LabelCalibration]:
    """Calibrate each label of the output's label set, and find the score from which its precision is at least `target`.

    Without a target, the accept threshold is the score with the best F1. `recall` is the share of the right images that
    the accept and review bands together should hold.

    Precision is estimated by 5-fold cross-validation by image: the accepted answers of a fold are counted at a
    threshold that the other folds chose, so that no answer both chooses a threshold and judges it. Bounds are Wilson's
    (1927), with Kish's effective number of answers when the answers have weights. The precision is that of the output's
    images; other images may be harder.

    A label in a group is calibrated as a label outside groups would be, before the group's softmax, and its thresholds
    apply to the score after the softmax. Calibrations that the label set already has are replaced.
    """
    names = output.labels.label_names()
    logits = _uncalibrated_head(output).logits(truth.embeddings)[truth.image, truth.label].astype(np.float64)
    groups = group_answers(truth, len(names))
    pooled = fit_platt(logits, truth.right, effective_weights(truth.weight), (1.0, 0.0), math.inf)
    fitted = []
    for answers in groups:
        scale, bias = fit_platt(
            logits[answers], truth.right[answers], effective_weights(truth.weight[answers]), pooled, PRIOR_DEVIATION
        )
        fitted.append(Calibration(scale=scale, bias=bias))
    labels = _replace_calibrations(output.labels, fitted)
    scores = _build_head(output, labels).scores(truth.embeddings)[truth.image, truth.label].astype(np.float64)
    folds = np.random.default_rng(seed).permutation(len(truth.positions))[truth.image] % FOLDS
    return [
        _calibrate_label(
            name,
            calibration,
            scores[answers],
            truth.right[answers],
            truth.weight[answers],
            folds[answers],
            target,
            recall,
        )
        for name, calibration, answers in zip(names, fitted, groups, strict=True)
    ]


def make_label_set(output: TaggedOutput, found: Sequence[LabelCalibration]) -> LabelSet:
    """Return the output's label set with these calibrations, `accept` thresholds, and `review` as the threshold."""
    names = [
        label.model_copy(update={"calibration": one.calibration, "threshold": one.review, "accept": one.accept})
        for label, one in zip(output.labels.names, found, strict=True)
    ]
    return LabelSet.model_validate(output.labels.model_copy(update={"names": tuple(names)}).model_dump())


def count_workload(output: TaggedOutput, labels: LabelSet) -> list[Workload]:
    """Count each label's accepted and review images, over all images of the output, in one pass."""
    head = _build_head(output, labels)
    review_from = np.asarray(labels.thresholds(), np.float32)
    accept_from = accept_thresholds(labels)
    accepted = np.zeros(len(review_from), np.int64)
    predicted = np.zeros(len(review_from), np.int64)
    for scores in output.scores(head):
        accepted += (scores >= accept_from).sum(axis=0)
        predicted += (scores >= review_from).sum(axis=0)
    return [Workload(int(sure), int(every - sure)) for sure, every in zip(accepted, predicted, strict=True)]


def fit_platt(
    logits: Doubles, right: NDArray[np.bool_], weight: Doubles, prior: tuple[float, float], deviation: float
) -> tuple[float, float]:
    """Fit Platt scaling (Platt 1999): the scale and bias that make sigmoid(scale * logit + bias) a probability.

    `logits`, `right` and `weight` are (A,), one item for each answer. Returns the maximum a posteriori estimate of a
    logistic regression. The bias has a normal prior with mean `prior[1]` and standard deviation `deviation`; the log
    scale has a normal prior with mean log(`prior[0]`) and a quarter of that deviation. An infinite deviation means no
    prior. Scaling the logit, and not the score, keeps differences between very low or very high scores.

    Returns `prior` when there is no answer, and when all answers are alike and there is no prior.
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


def effective_weights(weight: Doubles) -> Doubles:
    """Scale weights (A,) so that their sum is Kish's effective number of answers, (sum w)^2 / sum w^2."""
    return np.asarray(weight * weight.sum() / np.square(weight).sum() if len(weight) else weight, np.float64)


def wilson_bound(share: float | Doubles, count: float | Doubles, quantile: float) -> Doubles:
    """Wilson's lower bound (1927) of a proportion: `share` of `count` answers. It is 0 when `count` is 0."""
    share, count = np.asarray(share, np.float64), np.asarray(count, np.float64)
    square = quantile**2
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = share + square / (2 * count)
        spread = quantile * np.sqrt(np.maximum(share * (1 - share), 0) / count + square / (4 * count**2))
        bound = (centre - spread) / (1 + square / count)
    return np.where(count > 0, bound, 0.0)


def count_answers_needed(share: float, target: float) -> int | None:
    """The number of answers for which the 95 % bound of `share` reaches `target`, or None when no number is enough."""
    if share <= target:
        return None
    high = 1
    while wilson_bound(share, high, JUDGE_QUANTILE) < target and high < 10**9:
        high *= 2
    low = high // 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if wilson_bound(share, middle, JUDGE_QUANTILE) >= target else (middle + 1, high)
    return low


@dataclass(frozen=True)
class _PrecisionRecallCurve:
    """A precision-recall curve of weighted answers: a point for each distinct score (T,), the highest score first.

    `counts` is Kish's effective number of the answers at or above the threshold.
    """

    thresholds: Doubles
    counts: Doubles
    precision: Doubles
    recall: Doubles

    @classmethod
    def from_answers(cls, scores: Doubles, right: NDArray[np.bool_], weight: Doubles) -> _PrecisionRecallCurve:
        order = np.argsort(-scores, kind="stable")
        ordered, weight, right = scores[order], weight[order], right[order]
        last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) if len(ordered) else np.zeros(0, np.intp)
        total, squares = np.cumsum(weight)[last], np.cumsum(weight**2)[last]
        hits = np.cumsum(weight * right)[last]
        every = hits[-1] if len(hits) and hits[-1] else math.nan
        return cls(ordered[last], total**2 / squares, hits / total, hits / every)

    def choose(self, target: float | None, share: float = 1.0) -> int | None:
        """The index of the lowest threshold whose precision bound reaches `target`, or of the best F1 without a target.

        `share` is the fraction of all answers that the curve holds. The bound is computed for the number of answers
        that all of them would have. Returns None when no threshold reaches the target, or no answer is right.
        """
        if not len(self.thresholds) or math.isnan(self.recall[0]):
            return None
        if target is None:
            return int(np.argmax(2 * self.precision * self.recall / (self.precision + self.recall + 1e-12)))
        without_error = self.precision >= 1 - 1e-12
        bound = np.where(
            without_error,
            wilson_bound(self.precision, self.counts / share, JUDGE_QUANTILE),
            wilson_bound(self.precision, self.counts / share, CHOOSE_QUANTILE),
        )
        passing = np.flatnonzero(bound >= target)
        return int(passing[-1]) if len(passing) else None


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
        curve = _PrecisionRecallCurve.from_answers(scores[~held], right[~held], weight[~held])
        chosen = curve.choose(target, (FOLDS - 1) / FOLDS)
        if chosen is not None:
            accepted[held] = scores[held] >= curve.thresholds[chosen]
    held_out = _PrecisionRecallCurve.from_answers(np.zeros(accepted.sum()), right[accepted], weight[accepted])
    count = float(held_out.counts[0]) if accepted.any() else 0.0
    precision = float(held_out.precision[0]) if accepted.any() else math.nan
    bound = float(wilson_bound(precision, count, JUDGE_QUANTILE)) if accepted.any() else 0.0
    whole = _PrecisionRecallCurve.from_answers(scores, right, weight)
    chosen = whole.choose(target)
    reached = chosen is not None and (target is None or bound >= target)
    accept = _round_down(whole.thresholds[chosen]) if reached and chosen is not None else None
    positives = weight[right]
    found = LabelCalibration(
        name,
        len(scores),
        int(right.sum()),
        calibration,
        accept,
        min(_find_review_threshold(scores[right], positives, recall), 1.0 if accept is None else accept),
        int(accepted.sum()),
        precision,
        bound,
        float(positives[scores[right] >= accept].sum() / positives.sum())
        if accept is not None and right.any()
        else 0.0,
    )
    return (
        found if reached or target is None else replace(found, answers_needed=_estimate_answers_needed(whole, target))
    )


def _estimate_answers_needed(curve: _PrecisionRecallCurve, target: float) -> int | None:
    """About how many more accepted answers would show the target, at the threshold that needs the fewest."""
    needed = [
        count - int(seen)
        for share, seen in zip(curve.precision, curve.counts, strict=True)
        if (count := count_answers_needed(float(share), target)) is not None
    ]
    return max(1, min(needed)) if needed else None


def _find_review_threshold(scores: Doubles, weight: Doubles, recall: float) -> float:
    """The highest score that a share `recall` of the right answers reaches, by weight. 0 when no answer is right."""
    if not len(scores):
        return 0.0
    order = np.argsort(-scores, kind="stable")
    reached = np.searchsorted(np.cumsum(weight[order]), recall * weight.sum() * (1 - 1e-9))
    return _round_down(scores[order][min(reached, len(scores) - 1)])


def _round_down(score: float) -> float:
    """Round down to five significant digits: an image at the threshold still reaches it, and 1e-6 does not become 0."""
    if score <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(score)) - 4)
    return min(float(score), float(f"{math.floor(score / unit) * unit:.5g}"))


def _uncalibrated_head(output: TaggedOutput) -> LinearHead:
    """The output's head without calibrations: Platt scaling is fitted to the checkpoint's own logit."""
    return _build_head(output, _replace_calibrations(output.labels, [None] * len(output.labels.names)))


def _build_head(output: TaggedOutput, labels: LabelSet) -> LinearHead:
    return build_head(labels, output.head.vectors, output.table.scale, output.weights)


def _replace_calibrations(labels: LabelSet, fitted: Sequence[Calibration | None]) -> LabelSet:
    names = tuple(
        label.model_copy(update={"calibration": calibration})
        for label, calibration in zip(labels.names, fitted, strict=True)
    )
    return labels.model_copy(update={"names": names})
