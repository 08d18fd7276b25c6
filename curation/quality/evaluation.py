"""Evaluation of an output's labels against ground truth: what was accepted, what is left to review, what was missed.

The figures are about the labels that the output has: a label is predicted if it is written, that is, if its score
reaches its threshold and it is among the image's `top_k` best. The metrics are defined as scikit-learn defines them.

Answers about a sample give design-based estimates of the whole output, with intervals: see `curation.estimates.cells`
and `curation.estimates.confidence`. Answers that are no sample give the figures of the answered images, without
intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.estimates.cells import NOT_WRITTEN, WrittenRegions, count_cells
from curation.estimates.confidence import UNKNOWN, WRONG_ANSWERS, Cells, Estimate, estimate_share
from curation.estimates.curves import CurvePoint, trace_curves
from curation.estimates.figures import BandQuality, Figures, estimate_figures
from curation.quality.independence import separate
from curation.quality.suspects import Suspect, find_suspects
from curation.quality.truth import Truth, group_answers
from curation.tagged_output import TaggedOutput
from siglip.scoring import Floats

_MAX_CONFUSIONS = 20
_TOP_K = (1, 5)
_ANSWERS_FOR_SUSPECTS = 2_000_000
"""Suspects are not looked for among more answers than these: it would take more than some minutes."""
_TOO_MANY = f"suspect answers are not looked for among more than {_ANSWERS_FOR_SUSPECTS:,} answers"


@dataclass(frozen=True)
class LabelQuality:
    """One label's metrics. `right` of its `answers` say that the label is right.

    `accepted` and `review` are the bands of the written labels; without an `accept` threshold all of them are `review`.
    `precision`, `recall` and `f1` are those of both bands together. `prevalence` is the share of the images for which
    the label is right. `average_precision` needs answers about all images or all labels, and is not known otherwise.

    `independent` is False if these answers chose the label's `accept` threshold: the figures are then too good, unless
    all accepted images were looked at. `curve`
    shows what other thresholds would give; it is empty unless it was asked for and the answers are a sample.
    """

    label: str
    answers: int
    right: int
    unsure: int
    accepted: BandQuality
    review: BandQuality
    precision: Estimate
    recall: Estimate
    f1: Estimate
    prevalence: Estimate
    average_precision: Estimate = UNKNOWN
    independent: bool = True
    curve: tuple[CurvePoint, ...] = ()


@dataclass(frozen=True)
class Confusion:
    """A pair of confused labels: the label `given` is predicted but wrong, and the label `right` is right.

    `images` is the weighted number of such images; if not every image has an answer about each label, it is the number
    of answered images, and there may be more. `cosine` is that of the two labels' vectors in the head. `examples` are
    the positions of a few of the images in the output's order.
    """

    right: str
    given: str
    images: float
    cosine: float
    examples: tuple[int, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """The metrics of an output's labels. `mean` metrics are means over labels, `micro` metrics pool all answers.

    `output` and `digest` say which output was evaluated. `accepted` and `review` pool the bands of all labels that have
    answers. `mean_average_precision` is the mean over the labels that have both right and wrong answers. `top` is the
    top-k accuracy by k; it is empty unless exactly one label is right for each image. `wrong_answers` is the share of
    wrong answers that the intervals allow for. `notices` are warnings about the answers. `complete`: each image has an
    answer about each label.
    """

    output: str
    digest: str
    images: int
    answers: int
    unsure: int
    labels: list[LabelQuality]
    accepted: BandQuality
    review: BandQuality
    mean_average_precision: Estimate
    mean_f1: Estimate
    micro_precision: Estimate
    micro_recall: Estimate
    micro_f1: Estimate
    wrong_answers: float = WRONG_ANSWERS
    top: dict[int, Estimate] = field(default_factory=dict)
    confusions: list[Confusion] = field(default_factory=list)
    suspects: list[Suspect] = field(default_factory=list)
    notices: tuple[str, ...] = ()
    complete: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics for JSON: undefined and unknown values become null."""

        def clean(value: Any) -> Any:
            if isinstance(value, dict):
                return {str(key): clean(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [clean(item) for item in value]
            return None if isinstance(value, float) and math.isnan(value) else value

        made: dict[str, Any] = clean(asdict(self))
        return made


def identify(output: TaggedOutput) -> str:
    """A digest of the output's labels, thresholds and images, by which an evaluation is recognized as its own."""
    import hashlib
    import json

    labels = output.labels.model_dump(mode="json")
    content = json.dumps([output.fingerprint["labels.digest"], labels, output.rows], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def evaluate(
    output: TaggedOutput,
    truth: Truth,
    wrong_answers: float = WRONG_ANSWERS,
    curves: bool = False,
    most_suspects: int = 100,
) -> Evaluation:
    """Compare ground truth with the labels that the output has for the same images.

    Intervals describe images of this output, not other images, and they allow for a share `wrong_answers` of the
    answers to be wrong. A figure that the answers cannot tell is not known: see `confidence.WIDEST`. One pass over the
    output if the answers are a sample, and one more with `curves`, which traces the precision and recall of each label
    by threshold. At most `most_suspects` suspect answers of each kind are listed; finding them takes most of the time.
    """
    truth, dependent = separate(output.labels, truth)
    too_many = len(truth.image) > _ANSWERS_FOR_SUSPECTS
    scores = output.head.scores(truth.embeddings)
    names = output.labels.label_names()
    answered = np.unique(np.concatenate([truth.label, truth.unsure_label]))
    regions = WrittenRegions(output.labels)
    if truth.designs:
        figures, total = estimate_figures(count_cells(output, truth, answered, regions), wrong_answers)
    else:
        region = regions.assign(scores, np.arange(len(names)))[truth.label, truth.image]
        figures = [Figures.from_answers(truth, region, truth.label == label) for label in answered]
        total = Figures.from_answers(truth, region, truth.label >= 0)
    traced: list[tuple[CurvePoint, ...]] = [()] * len(answered)
    if curves and truth.designs:
        traced = trace_curves(output, truth, answered, wrong_answers)
    groups = group_answers(truth, len(names))
    labels = []
    for label, one, curve in zip(answered.tolist(), figures, traced, strict=True):
        mine = groups[label]
        precise = _average_precision(truth, scores, mine) if truth.complete else UNKNOWN
        counts = len(mine), int(truth.right[mine].sum()), int((truth.unsure_label == label).sum())
        labels.append(
            LabelQuality(
                names[label],
                *counts,
                one.accepted,
                one.review,
                one.precision,
                one.recall,
                one.f1,
                one.prevalence,
                precise,
                label not in dependent or _is_looked_at(one.accepted),
                curve,
            )
        )
    defined = [one.average_precision.value for one in labels if one.average_precision.known]
    return Evaluation(
        output.uri,
        identify(output),
        len(np.unique(np.concatenate([truth.image, truth.unsure_image]))),
        len(truth.image),
        len(truth.unsure_image),
        labels,
        total.accepted,
        total.review,
        Estimate(float(np.mean(defined))) if defined else UNKNOWN,
        total.mean_f1 if truth.designs else _mean([one.f1 for one in labels]),
        total.precision,
        total.recall,
        total.f1,
        wrong_answers,
        top=_estimate_top_k(output, truth, scores, wrong_answers) if truth.exclusive else {},
        confusions=_find_confusions(output, truth, scores),
        suspects=find_suspects(output, truth, most_suspects) if most_suspects and not too_many else [],
        notices=(*truth.notices, *([_TOO_MANY] if most_suspects and too_many else [])),
        complete=truth.complete,
    )


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    known = [one.value for one in estimates if one.known]
    return Estimate(float(np.mean(known))) if known else UNKNOWN


def _is_looked_at(band: BandQuality) -> bool:
    return band.images > 0 and band.answers >= band.images


def _average_precision(truth: Truth, scores: Floats, answers: NDArray[np.intp]) -> Estimate:
    """The average precision of one label, as in scikit-learn: equal scores share a rank. Without an interval."""
    right = truth.right[answers]
    if right.all() or not right.any():
        return UNKNOWN
    score = scores[truth.image[answers], truth.label[answers]]
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    weight = truth.weight[answers][order]
    hits = np.cumsum(weight * right[order])[last]
    precision = hits / np.cumsum(weight)[last]
    return Estimate(float((np.diff(hits, prepend=0) * precision).sum() / hits[-1]))


def _estimate_top_k(output: TaggedOutput, truth: Truth, scores: Floats, wrong_answers: float) -> dict[int, Estimate]:
    """The share of images whose right label has one of the k highest scores."""
    right = np.flatnonzero(truth.right)
    mine = scores[truth.image[right]]
    better = (mine > mine[np.arange(len(right)), truth.label[right]][:, None]).sum(axis=1)
    weight = truth.weight[right]
    found = {}
    for k in (k for k in _TOP_K if k < len(output.labels.names)):
        hits = better < k
        if truth.designs:
            counts = (output.rows, len(right), int(hits.sum()), 0)
            found[k] = estimate_share(Cells(*(np.asarray([count]) for count in counts)), wrong_answers)
        else:
            found[k] = Estimate(float(weight[hits].sum() / weight.sum()))
    return found


def _find_confusions(output: TaggedOutput, truth: Truth, scores: Floats) -> list[Confusion]:
    """Find the pairs of labels that are confused most often.

    Only answers count: an image on which a wrong label is written, and about whose right label nobody was asked, is in
    no pair. Predicted labels are those that the output has, or, when exactly one label is right for each image, the
    label with the highest score.
    """
    names, vectors = output.labels.label_names(), output.head.vectors
    several = np.intersect1d(truth.image[truth.right], truth.image[~truth.right])  # other images are in no pair
    row = np.full(len(truth.positions), -1, np.int64)
    row[several] = np.arange(len(several))
    positions, scores = truth.positions[several], scores[several]
    answered = row[truth.image] >= 0
    image, label, said = row[truth.image[answered]], truth.label[answered], truth.right[answered]
    right, wrong = (np.zeros((len(several), len(names)), bool) for _ in range(2))
    right[image[said], label[said]] = True
    wrong[image[~said], label[~said]] = True
    weight = np.ones(len(several))
    if truth.complete:
        weight[image] = truth.weight[answered]
    if truth.exclusive:
        predicted = scores >= scores.max(axis=1, keepdims=True)
    else:
        predicted = WrittenRegions(output.labels).assign(scores, np.arange(len(names))).T != NOT_WRITTEN
    pairs = (right * weight[:, None]).T @ (predicted & wrong)
    found = np.argsort(-pairs, axis=None, kind="stable")[:_MAX_CONFUSIONS]
    made = []
    for one, other in (divmod(int(flat), len(names)) for flat in found):
        if pairs[one, other] > 0:
            images = np.flatnonzero(right[:, one] & predicted[:, other] & wrong[:, other])
            examples = tuple(positions[images[np.argsort(-scores[images, other])][:5]].tolist())
            cosine = float(vectors[one] @ vectors[other])
            made.append(Confusion(names[one], names[other], float(pairs[one, other]), cosine, examples))
    return made


def rank_labels(labels: Sequence[LabelQuality]) -> list[LabelQuality]:
    """Sort labels by precision, the lowest first. Labels whose precision is not known come last."""
    return sorted(labels, key=lambda one: (not one.precision.known, one.precision.value))
