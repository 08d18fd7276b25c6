"""Evaluation of an output's labels against ground truth: precision, recall, F1, average precision, with intervals.

Also top-k accuracy, confused labels, and answers that may themselves be wrong. The metrics are defined as scikit-learn
defines them. Each answer counts with its weight, so that answers about a sample estimate the metrics of the whole
output, and not those of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.quality.suspects import Suspect, find_suspects
from curation.quality.truth import Truth, group_answers
from curation.tagged_output import TaggedOutput
from siglip.scoring import Floats

Doubles = NDArray[np.float64]
RESAMPLES = 500
_MIN_RESAMPLES, _MAX_CELLS = 100, 1e9
"""Bounds of the bootstrap's cost: fewer resamples are drawn when resamples times answers would exceed `_MAX_CELLS`, but
never fewer than `_MIN_RESAMPLES`."""
_NORMAL_QUANTILE = 1.96
"""95 % of a normal distribution are within this many standard deviations of its mean."""
_MAX_CONFUSIONS, _MAX_SUSPECTS = 20, 100
_TOP_K = (1, 5)


@dataclass(frozen=True)
class Estimate:
    """A metric between 0 and 1 and its 95 % interval: the value plus and minus 1.96 standard deviations of resamples.

    NaN when the metric is not defined: the precision of a label that is never predicted, or the recall of a label that
    is never right.
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        return f"{self.value:.3f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class LabelQuality:
    """One label's metrics at its threshold. `right` of its `answers` say that the label is right."""

    label: str
    answers: int
    right: int
    precision: Estimate
    recall: Estimate
    f1: Estimate
    average_precision: Estimate


@dataclass(frozen=True)
class Confusion:
    """A pair of confused labels: the label `given` is predicted but wrong, and the label `right` is right.

    `images` is the weighted number of such images. `cosine` is that of the two labels' vectors in the head.
    """

    right: str
    given: str
    images: float
    cosine: float


@dataclass(frozen=True)
class Evaluation:
    """The metrics of an output's labels. `mean` metrics are means over labels, `micro` metrics pool all answers.

    `mean_average_precision` is the mean over the labels that have both right and wrong answers. `top` is the top-k
    accuracy by k; it is empty unless exactly one label is right for each image.
    """

    images: int
    answers: int
    labels: list[LabelQuality]
    mean_average_precision: Estimate
    mean_f1: Estimate
    micro_precision: Estimate
    micro_recall: Estimate
    micro_f1: Estimate
    top: dict[int, Estimate] = field(default_factory=dict)
    confusions: list[Confusion] = field(default_factory=list)
    suspects: list[Suspect] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics for JSON: undefined values become null."""

        def clean(value: Any) -> Any:
            if isinstance(value, dict):
                return {str(key): clean(item) for key, item in value.items()}
            if isinstance(value, list):
                return [clean(item) for item in value]
            return None if isinstance(value, float) and math.isnan(value) else value

        made: dict[str, Any] = clean(asdict(self))
        return made


def evaluate(output: TaggedOutput, truth: Truth, resamples: int = RESAMPLES, seed: int = 0) -> Evaluation:
    """Compare ground truth with the predictions of the output's head for the same images.

    A label is predicted when its score reaches its threshold. `top_k`, which may keep a predicted label out of the
    output, is ignored.

    Intervals come from a Bayesian bootstrap over images (Rubin 1981). They describe images of this output, not other
    images. An interval is the value plus and minus 1.96 standard deviations of the resamples, and not a percentile
    interval: random weights shift a mean over labels in one direction, so that a percentile interval may not contain
    the value.
    """
    scores = output.head.scores(truth.embeddings)
    thresholds = np.asarray(output.labels.thresholds(), np.float32)
    names = output.labels.label_names()
    answered = scores[truth.image, truth.label]
    predicted = answered >= thresholds[truth.label]
    draws = _draw_bootstrap_weights(
        len(truth.positions), min(resamples, max(_MIN_RESAMPLES, int(_MAX_CELLS / len(answered)))), seed
    )
    counts = _count_outcomes(truth, predicted, len(names), draws)
    average_precision = [
        _average_precision(truth, answered, answers, draws) for answers in group_answers(truth, len(names))
    ]
    precision, recall, f1 = _precision_recall_f1(*counts)
    totals = [count.sum(axis=1, keepdims=True) for count in counts]
    micro_precision, micro_recall, micro_f1 = (_estimate(metric[:, 0]) for metric in _precision_recall_f1(*totals))
    answer_counts = np.bincount(truth.label, minlength=len(names))
    right_counts = np.bincount(truth.label[truth.right], minlength=len(names))
    labels = [
        LabelQuality(
            name,
            int(answer_counts[row]),
            int(right_counts[row]),
            _estimate(precision[:, row]),
            _estimate(recall[:, row]),
            _estimate(f1[:, row]),
            _estimate(average_precision[row]),
        )
        for row, name in enumerate(names)
        if answer_counts[row]
    ]
    labelled = np.flatnonzero(answer_counts)
    return Evaluation(
        len(truth.positions),
        len(truth.image),
        labels,
        _estimate(_mean_over_labels(np.asarray(average_precision).T[:, labelled])),
        _estimate(_mean_over_labels(f1[:, labelled])),
        micro_precision,
        micro_recall,
        micro_f1,
        top={k: _estimate(_top_k_accuracy(truth, scores, k, draws)) for k in _TOP_K if k < len(names)}
        if truth.exclusive
        else {},
        confusions=_find_confusions(output, truth, scores, thresholds) if truth.complete else [],
        suspects=find_suspects(output, truth)[:_MAX_SUSPECTS],
    )


def _draw_bootstrap_weights(images: int, resamples: int, seed: int) -> Doubles:
    """Draw the weights of a Bayesian bootstrap, float64 (1 + resamples, images). Row 0 is ones: the original data.

    Each other row is a draw from Dirichlet(1, ..., 1), times `images`, so no weight is 0 (Rubin 1981). The usual
    bootstrap draws images with replacement. A label with a single positive image would then be missing from 37 % of the
    resamples, and a mean over labels would be a mean over fewer labels than in the original data.
    """
    drawn = np.random.default_rng(seed).dirichlet(np.ones(images), size=resamples) * images
    return np.concatenate([np.ones((1, images)), drawn])


def _count_outcomes(
    truth: Truth, predicted: NDArray[np.bool_], labels: int, draws: Doubles
) -> tuple[Doubles, Doubles, Doubles]:
    """Count weighted true positives, false positives and false negatives: (1 + R, L) each, by resample and label."""
    kinds = (predicted & truth.right, predicted & ~truth.right, ~predicted & truth.right)
    counted = []
    for kind in kinds:
        cells = np.zeros((len(truth.positions), labels))
        np.add.at(cells, (truth.image[kind], truth.label[kind]), truth.weight[kind])
        counted.append(draws @ cells)
    return counted[0], counted[1], counted[2]


def _precision_recall_f1(hits: Doubles, false: Doubles, missed: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Precision, recall and F1 as in scikit-learn's `precision_recall_fscore_support`, but NaN where not defined."""
    with np.errstate(invalid="ignore"):
        return hits / (hits + false), hits / (hits + missed), 2 * hits / (2 * hits + false + missed)


def _average_precision(truth: Truth, scores: Floats, answers: NDArray[np.intp], draws: Doubles) -> Doubles:
    """The average precision of one label in each resample, (1 + R,), as in scikit-learn: equal scores share a rank."""
    right = truth.right[answers]
    if right.all() or not right.any():
        return np.full(len(draws), math.nan)
    order = answers[np.argsort(-scores[answers], kind="stable")]
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    weights = draws[:, truth.image[order]] * truth.weight[order]
    hits = np.cumsum(weights * truth.right[order], axis=1)[:, last]
    precision = hits / np.cumsum(weights, axis=1)[:, last]
    return np.asarray((np.diff(hits, axis=1, prepend=0) * precision).sum(axis=1) / hits[:, -1], np.float64)


def _top_k_accuracy(truth: Truth, scores: Floats, k: int, draws: Doubles) -> Doubles:
    """The weighted share of images whose right label has one of the k highest scores, in each resample: (1 + R,)."""
    right = np.flatnonzero(truth.right)
    label, image = truth.label[right], truth.image[right]
    mine = scores[image]
    better = (mine > mine[np.arange(len(right)), label][:, None]).sum(axis=1)
    weights = draws[:, image] * truth.weight[right]
    return np.asarray((weights * (better < k)).sum(axis=1) / weights.sum(axis=1), np.float64)


def _find_confusions(output: TaggedOutput, truth: Truth, scores: Floats, thresholds: Floats) -> list[Confusion]:
    """Find the pairs of labels that are confused most often.

    Predicted labels are those whose score reaches the threshold, or, when exactly one label is right for each image,
    the label with the highest score.
    """
    names, vectors = output.labels.label_names(), output.head.vectors
    right = np.zeros((len(truth.positions), len(names)), bool)
    right[truth.image, truth.label] = truth.right
    weight = np.zeros(len(truth.positions))
    weight[truth.image] = truth.weight
    predicted = scores >= scores.max(axis=1, keepdims=True) if truth.exclusive else scores >= thresholds
    pairs = (right * weight[:, None]).T @ (predicted & ~right)
    found = np.argsort(-pairs, axis=None, kind="stable")[:_MAX_CONFUSIONS]
    return [
        Confusion(names[one], names[other], float(pairs[one, other]), float(vectors[one] @ vectors[other]))
        for one, other in (divmod(int(flat), len(names)) for flat in found)
        if pairs[one, other] > 0
    ]


def _mean_over_labels(metric: Doubles) -> Doubles:
    """The mean over the labels for which the metric is defined, in each resample: (1 + R, L) to (1 + R,)."""
    defined = ~np.isnan(metric)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined, metric, 0).sum(axis=1) / defined.sum(axis=1), np.float64)


def _estimate(metric: Doubles) -> Estimate:
    """An estimate from a metric (1 + R,): the first item is its value, the others are its resamples."""
    value = float(metric[0])
    half_width = _NORMAL_QUANTILE * float(np.std(metric[1:]))
    low, high = np.clip([value - half_width, value + half_width], 0, 1)
    return Estimate(value, float(low), float(high))


def rank_labels(labels: Sequence[LabelQuality]) -> list[LabelQuality]:
    """Sort labels by F1, the lowest first. Labels with an undefined F1 come last."""
    return sorted(labels, key=lambda one: (math.isnan(one.f1.value), one.f1.value))
