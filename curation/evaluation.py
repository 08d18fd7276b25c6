"""How right an output's labels are: multi-label first, with intervals, and where truth itself is suspect.

The figures are scikit-learn's. Where truth was sampled, each answer counts with its weight, so that they are estimates
of the whole output and not of what somebody looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.tagged_output import TaggedOutput
from curation.truth import Truth
from siglip.scoring import Floats

Doubles = NDArray[np.float64]
RESAMPLES = 500
_LEAST_RESAMPLES, _WORK = 100, 1e9
"""Resamples are fewer where resamples times answers would be more than this, and not fewer than that."""
_REACH = 1.96
"""Standard deviations of a normal distribution to either side of its middle that hold 95 % of it."""
_PAIRS, _SUSPECTS = 20, 100
_TOP = (1, 5)


@dataclass(frozen=True)
class Estimate:
    """A figure between 0 and 1, and its interval of 95 %: 1.96 standard deviations of its resamples to either side.

    NaN where it is not defined: the precision of a label never given, or the recall of one that is never right.
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
    """One label's figures at its threshold. `answers` were given, `right` of them that it is."""

    label: str
    answers: int
    right: int
    precision: Estimate
    recall: Estimate
    f1: Estimate
    average_precision: Estimate


@dataclass(frozen=True)
class Confusion:
    """How often `given` was given, and wrong, where `right` is right: a count of images, weighted."""

    right: str
    given: str
    images: float
    cosine: float


@dataclass(frozen=True)
class Suspect:
    """An answer that the model contradicts. `margin` is by how many standard deviations its logit lies beyond what is
    usual for the opposite answer."""

    id: str
    key: str
    label: str
    answer: str
    score: float
    margin: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. `top` is by k, where an image has one label. `mean` is over labels, `micro` over answers.

    `mean_average_precision` is over the labels that are right somewhere and wrong somewhere.
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
        """For JSON: what is not defined is null."""

        def clean(value: Any) -> Any:
            if isinstance(value, dict):
                return {str(key): clean(item) for key, item in value.items()}
            if isinstance(value, list):
                return [clean(item) for item in value]
            return None if isinstance(value, float) and math.isnan(value) else value

        made: dict[str, Any] = clean(asdict(self))
        return made


def evaluate(output: TaggedOutput, truth: Truth, resamples: int = RESAMPLES, seed: int = 0) -> Evaluation:
    """Compare truth with what the output's head says of the same images.

    A label is given where its score reaches its threshold: `top_k`, which may keep it from being written, is left out.
    Resamples are a Bayesian bootstrap's over images (Rubin 1981); what the model would do on other images than those of
    this output the intervals do not say. Means over labels move one way when weights are drawn, so that percentiles of
    the resamples may lie beside the figure itself: the interval is of their spread.
    """
    scores = output.head.scores(truth.embeddings)
    thresholds = np.asarray(output.labels.thresholds(), np.float32)
    names = output.labels.label_names()
    mine = scores[truth.image, truth.label]
    given = mine >= thresholds[truth.label]
    draws = _draw(len(truth.positions), min(resamples, max(_LEAST_RESAMPLES, int(_WORK / len(mine)))), seed)
    counts = _count(truth, given, len(names), draws)
    curves = [_rank(truth, mine, asked, draws) for asked in group_answers(truth, len(names))]
    precision, recall, f1 = _figures(*counts)
    totals = [part.sum(axis=1, keepdims=True) for part in counts]
    micro_precision, micro_recall, micro_f1 = (_estimate(figure[:, 0]) for figure in _figures(*totals))
    asked = np.bincount(truth.label, minlength=len(names))
    right = np.bincount(truth.label[truth.right], minlength=len(names))
    labels = [
        LabelQuality(
            name,
            int(asked[row]),
            int(right[row]),
            _estimate(precision[:, row]),
            _estimate(recall[:, row]),
            _estimate(f1[:, row]),
            _estimate(curves[row]),
        )
        for row, name in enumerate(names)
        if asked[row]
    ]
    told = np.flatnonzero(asked)
    return Evaluation(
        len(truth.positions),
        len(truth.image),
        labels,
        _estimate(_mean(np.asarray(curves).T[:, told])),
        _estimate(_mean(f1[:, told])),
        micro_precision,
        micro_recall,
        micro_f1,
        top={k: _estimate(_top(truth, scores, k, draws)) for k in _TOP if k < len(names)} if truth.exclusive else {},
        confusions=_confuse(output, truth, scores, thresholds) if truth.complete else [],
        suspects=find_suspects(output, truth)[:_SUSPECTS],
    )


def find_suspects(output: TaggedOutput, truth: Truth) -> list[Suspect]:
    """Answers that the model contradicts, worst first.

    One is suspect as confident learning has it (Northcutt, Jiang and Chuang 2021): the model is at least as sure of
    the opposite as it is, on average, where the opposite was answered. They are ranked by how far beyond that average
    the logit lies, in the standard deviations of that label's opposite answers, so that labels with large scores do not
    fill the list. A label that was always answered alike has no suspects.
    """
    logits = truth.logits(output).astype(np.float64)
    scores = output.head.scores(truth.embeddings)[truth.image, truth.label]
    names = output.labels.label_names()
    margins = np.full(len(logits), -math.inf)
    for answers in group_answers(truth, len(names)):
        for answer in (True, False):
            asked = answers[truth.right[answers] == answer]
            other = logits[answers[truth.right[answers] != answer]]
            if len(asked) and len(other) > 1:
                distance = (logits[asked] - other.mean()) / max(other.std(ddof=1), 1e-6)
                margins[asked] = -distance if answer else distance
    order = np.argsort(-margins, kind="stable")
    return [
        Suspect(
            truth.ids[truth.image[i]],
            truth.keys[truth.image[i]],
            names[truth.label[i]],
            "right" if truth.right[i] else "wrong",
            float(scores[i]),
            float(margins[i]),
        )
        for i in order[: np.count_nonzero(margins >= 0)]
    ]


def _draw(images: int, resamples: int, seed: int) -> Doubles:
    """What each image counts for in each resample, (1 + R, M): the first row is the images as they are.

    No weight is 0. Were whole images drawn, a label that is right in one image only would be missing from a third of
    the resamples, and a mean over labels would be of other labels than the figure.
    """
    drawn = np.random.default_rng(seed).dirichlet(np.ones(images), size=resamples) * images
    return np.concatenate([np.ones((1, images)), drawn])


def _count(truth: Truth, given: NDArray[np.bool_], labels: int, draws: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """True positives, false positives and false negatives by resample and label, weighted: (1 + R, L) each."""
    kinds = (given & truth.right, given & ~truth.right, ~given & truth.right)
    counted = []
    for kind in kinds:
        cells = np.zeros((len(truth.positions), labels))
        np.add.at(cells, (truth.image[kind], truth.label[kind]), truth.weight[kind])
        counted.append(draws @ cells)
    return counted[0], counted[1], counted[2]


def _figures(hits: Doubles, false: Doubles, missed: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Precision, recall and F1, as scikit-learn's `precision_recall_fscore_support` has them; NaN where not defined."""
    with np.errstate(invalid="ignore"):
        return hits / (hits + false), hits / (hits + missed), 2 * hits / (2 * hits + false + missed)


def group_answers(truth: Truth, labels: int) -> list[NDArray[np.intp]]:
    """For each label which answers are about it, in order."""
    order = np.argsort(truth.label, kind="stable")
    return np.split(order, np.searchsorted(truth.label[order], np.arange(1, labels)))


def _rank(truth: Truth, scores: Floats, asked: NDArray[np.intp], draws: Doubles) -> Doubles:
    """The average precision of a label's answers by resample, (1 + R,), as scikit-learn has it: ties are one rank."""
    right = truth.right[asked]
    if right.all() or not right.any():
        return np.full(len(draws), math.nan)
    order = asked[np.argsort(-scores[asked], kind="stable")]
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    weights = draws[:, truth.image[order]] * truth.weight[order]
    hits = np.cumsum(weights * truth.right[order], axis=1)[:, last]
    precision = hits / np.cumsum(weights, axis=1)[:, last]
    return np.asarray((np.diff(hits, axis=1, prepend=0) * precision).sum(axis=1) / hits[:, -1], np.float64)


def _top(truth: Truth, scores: Floats, k: int, draws: Doubles) -> Doubles:
    """By resample the share of images whose one right label is among the k best, weighted: (1 + R,)."""
    right = np.flatnonzero(truth.right)
    label, image = truth.label[right], truth.image[right]
    mine = scores[image]
    better = (mine > mine[np.arange(len(right)), label][:, None]).sum(axis=1)
    weights = draws[:, image] * truth.weight[right]
    return np.asarray((weights * (better < k)).sum(axis=1) / weights.sum(axis=1), np.float64)


def _confuse(output: TaggedOutput, truth: Truth, scores: Floats, thresholds: Floats) -> list[Confusion]:
    """The pairs of labels that are taken for each other most often. With one label an image, the best one is given."""
    names, vectors = output.labels.label_names(), output.head.vectors
    right = np.zeros((len(truth.positions), len(names)), bool)
    right[truth.image, truth.label] = truth.right
    weight = np.zeros(len(truth.positions))
    weight[truth.image] = truth.weight
    given = scores >= scores.max(axis=1, keepdims=True) if truth.exclusive else scores >= thresholds
    pairs = (right * weight[:, None]).T @ (given & ~right)
    found = np.argsort(-pairs, axis=None, kind="stable")[:_PAIRS]
    return [
        Confusion(names[one], names[other], float(pairs[one, other]), float(vectors[one] @ vectors[other]))
        for one, other in (divmod(int(flat), len(names)) for flat in found)
        if pairs[one, other] > 0
    ]


def _mean(figures: Doubles) -> Doubles:
    """By resample the mean over the labels for which the figure is defined."""
    defined = ~np.isnan(figures)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined, figures, 0).sum(axis=1) / defined.sum(axis=1), np.float64)


def _estimate(figures: Doubles) -> Estimate:
    """The first is the figure, the others its resamples."""
    value = float(figures[0])
    reach = _REACH * float(np.std(figures[1:]))
    low, high = np.clip([value - reach, value + reach], 0, 1)
    return Estimate(value, float(low), float(high))


def rank_labels(labels: Sequence[LabelQuality]) -> list[LabelQuality]:
    """The labels whose F1 is lowest first; those of which nothing is known last."""
    return sorted(labels, key=lambda one: (math.isnan(one.f1.value), one.f1.value))
