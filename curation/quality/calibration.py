"""Calibration: find the score from which a label's precision reaches a target, from answers, and what it would take.

An image whose score reaches a label's `accept` threshold is accepted without a person. An image between the label's
threshold and `accept` is left for a person to review.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from curation.estimates.cells import (
    ACCEPT,
    REVIEW,
    CellTable,
    ThresholdRegions,
    WrittenRegions,
    count_cells,
    weigh_answers,
)
from curation.estimates.confidence import (
    ONE_SIDED,
    WRONG_ANSWERS,
    bound_precision,
    is_enough,
    reaches,
    target_of_answers,
)
from curation.estimates.forecast import Forecast, forecast_answers
from curation.quality.independence import make_fingerprint, separate
from curation.quality.platt import PRIOR_DEVIATION, effective_weights, fit_platt
from curation.quality.truth import Truth, check_sampled, group_answers
from curation.sampling.sample import assume_threshold
from curation.tagged_output import TaggedOutput
from siglip.heads import LinearHead, build_head
from siglip.label_text.fitted import Calibration
from siglip.labels import LabelSet
from siglip.scoring import Floats

STEPS = np.arange(-8.0, 12.01, 0.25)
"""The thresholds that are tried, in logits from the label's own threshold. They do not depend on the answers."""

_MARGIN = 0.01
"""How far, in logits, a further round begins below the threshold that it is for."""


@dataclass(frozen=True)
class LabelCalibration:
    """The calibration of one label, with the figures that it rests on.

    `answers` is the number of answers about the label, `right` the number of those that say right. `accept` is the
    lowest score from which the target precision is shown, or None when no score is. `threshold` and `calibration` go
    with it; `calibration` is None for a label of a group, whose scores stay as they are. `trained` is True if there are
    only answers that trained the label's probe: they cannot calibrate it. `crowded_out` is True if a score was found,
    but the target is not shown for the images on which `top_k` leaves the label.

    `forecast` says what it would take to reach the target, when it is not reached. It is None if no threshold that was
    looked at can reach it.
    """

    label: str
    answers: int
    right: int
    accept: float | None = None
    threshold: float = 0.0
    calibration: Calibration | None = None
    fingerprint: str = ""
    forecast: Forecast | None = None
    trained: bool = False
    crowded_out: bool = False


@dataclass(frozen=True)
class Workload:
    """The number of images of the whole output on which a label is written: accepted, and left to be reviewed."""

    accepted: int
    review: int


def calibrate(
    output: TaggedOutput, truth: Truth, target: float | None = 0.9, wrong_answers: float = WRONG_ANSWERS
) -> list[LabelCalibration]:
    """Find for each label that has answers the lowest score from which its precision is at least `target`.

    Returns one item for each label of the output's label set; labels without answers have `answers` 0. Without a
    target, the accept threshold is the score with the best F1, for which nothing is promised.

    A threshold passes if the one-sided 95 % lower bound of the precision above it reaches the target, with the design
    of the samples and an allowance for a share `wrong_answers` of wrong answers (see `curation.estimates.confidence`).
    The lowest passing threshold is taken. After n rounds of questions about a label it is a 1 - 0.05 / n bound, because
    each round is another chance to pass. Several thresholds are tried, so that the precision could be missed in more
    than 5 % of samples; `benchmarks/calibration.py` measures how often it is. The precision is that of the output's
    images; other images may be harder.

    The scores of a label that reaches the target become probabilities by Platt scaling. Those of a group's labels do
    not, because they add up to 1 as they are.

    Two passes over the output. Raises `ConfigError` for answers that are no sample.
    """
    check_sampled(truth)
    truth, trained = separate(output.labels, truth, training_only=True)
    truth = weigh_answers(output, truth)
    groups = group_answers(truth, len(output.labels.names))
    found = [
        LabelCalibration(name, len(groups[row]), int(truth.right[groups[row]].sum()), trained=row in trained)
        for row, name in enumerate(output.labels.label_names())
    ]
    rows = np.asarray([row for row, one in enumerate(found) if one.answers and not one.trained], np.int64)
    if not len(rows):
        return found
    fitted = _fit_calibrations(output, truth, groups)
    head = _build_head(output, _replace_calibrations(output.labels, fitted))
    thresholds = np.stack([_list_thresholds(output, row, fitted[row]) for row in rows])
    tables = count_cells(output, truth, rows, ThresholdRegions(thresholds), head)
    for row, tried, table in zip(rows.tolist(), thresholds, tables, strict=True):
        alpha = _share_risk(truth, found[row].label)
        one = found[row]
        passing = _choose_best_f1(table) if target is None else _find_lowest(table, target, wrong_answers, alpha)
        if passing is None:
            forecast = forecast_answers(table, tried, target or 1.0, wrong_answers, alpha / 2)
            found[row] = replace(one, forecast=forecast)
            continue
        accept = float(str(tried[passing]))  # the shortest number that is this float32
        found[row] = replace(
            one,
            accept=accept,
            threshold=min(_convert_threshold(output, row, fitted[row]), accept),
            calibration=fitted[row],
            fingerprint=make_fingerprint(truth, row),
        )
    return found if target is None else _confirm_written(output, truth, found, target, wrong_answers)


@dataclass(frozen=True)
class Round:
    """A further round of questions: for each label, by its index, the score from which its images are to be drawn.

    The other labels are not asked about: `reached` the target, `hopeless` ones have no threshold that can, and
    `unanswered` ones have no answers to plan by, or only those that trained their probe.
    """

    from_scores: dict[int, float]
    reached: list[str]
    hopeless: list[str]
    unanswered: list[str]


def plan_round(output: TaggedOutput, truth: Truth, target: float, wrong_answers: float = WRONG_ANSWERS) -> Round:
    """Plan where to ask more questions, so that more labels reach the target. Arguments are those of `calibrate`."""
    plan = Round({}, [], [], [])
    for row, one in enumerate(calibrate(output, truth, target, wrong_answers)):
        if not one.answers or one.trained:
            plan.unanswered.append(one.label)
        elif one.accept is not None:
            plan.reached.append(one.label)
        elif one.forecast is None:
            plan.hopeless.append(one.label)
        else:
            # A little lower, so that the new scores' thresholds, which are rounded, are not below the stratum's border.
            logit = _first_logit(output, row) + float(STEPS[one.forecast.threshold]) - _MARGIN
            plan.from_scores[row] = 1 / (1 + math.exp(-logit))
    return plan


def make_label_set(output: TaggedOutput, found: Sequence[LabelCalibration]) -> LabelSet:
    """Return the output's label set with the labels that are calibrated. All other labels stay exactly as they are."""
    names = [
        label
        if one.accept is None
        else label.model_copy(
            update={
                "calibration": one.calibration or label.calibration,
                "threshold": one.threshold,
                "accept": one.accept,
                "chosen_by": one.fingerprint,
            }
        )
        for label, one in zip(output.labels.names, found, strict=True)
    ]
    return LabelSet.model_validate(output.labels.model_copy(update={"names": tuple(names)}).model_dump())


def count_workload(output: TaggedOutput, labels: LabelSet) -> list[Workload]:
    """Count the images on which each label would be written, by band, over the whole output, in one pass."""
    head = _build_head(output, labels)
    regions = WrittenRegions(labels)
    every = np.arange(len(labels.names))
    counts = np.zeros((len(every), regions.count), np.int64)
    for scores in output.scores(head):
        assigned = regions.assign(scores, every) + regions.count * every[:, None]
        counts += np.bincount(assigned.reshape(-1), minlength=counts.size).reshape(counts.shape)
    return [Workload(int(one[ACCEPT]), int(one[REVIEW])) for one in counts]


def _fit_calibrations(
    output: TaggedOutput, truth: Truth, groups: Sequence[NDArray[np.intp]]
) -> list[Calibration | None]:
    """Fit the calibration of each label that has answers. Other labels and those of groups keep the one they have."""
    plain = _build_head(output, _replace_calibrations(output.labels, [None] * len(groups)))
    logits = plain.logits(truth.embeddings)[truth.image, truth.label].astype(np.float64)
    grouped = {row for group in plain.groups for row in group}
    pooled = fit_platt(logits, truth.right, effective_weights(truth.weight), (1.0, 0.0), math.inf)
    fitted: list[Calibration | None] = []
    for row, answers in enumerate(groups):
        if row in grouped or not len(answers):
            fitted.append(output.labels.names[row].calibration)
            continue
        weight = effective_weights(truth.weight[answers])
        scale, bias = fit_platt(logits[answers], truth.right[answers], weight, pooled, PRIOR_DEVIATION)
        fitted.append(Calibration(scale=scale, bias=bias, model=output.weights))
    return fitted


def _list_thresholds(output: TaggedOutput, row: int, fitted: Calibration | None) -> Floats:
    """The thresholds that are tried for a label, on the scale of its new scores: increasing float32 (T,).

    They are rounded down to five digits, as they are written in a label set.
    """
    first = _first_logit(output, row)
    points = [_round_down(_to_new_score(output, row, fitted, first + step)) for step in STEPS]
    return np.maximum.accumulate(np.asarray(points, np.float32))


def _first_logit(output: TaggedOutput, row: int) -> float:
    """The logit of the label's threshold, from which `STEPS` are counted."""
    return _logit(assume_threshold(output.labels.thresholds()[row]))


def _convert_threshold(output: TaggedOutput, row: int, fitted: Calibration | None) -> float:
    """The label's threshold on the scale of its new scores."""
    threshold = output.labels.thresholds()[row]
    if not 0 < threshold < 1:
        return threshold
    return _round_down(_to_new_score(output, row, fitted, _logit(threshold)))


def _to_new_score(output: TaggedOutput, row: int, fitted: Calibration | None, logit: float) -> float:
    """The score that a label's logit, by its present calibration, has with a new calibration."""
    present = output.labels.names[row].calibration
    if fitted is not None and fitted is not present:
        plain = logit if present is None else (logit - present.bias) / present.scale
        logit = fitted.scale * plain + fitted.bias
    return 1 / (1 + math.exp(-max(min(logit, 700.0), -700.0)))


def _share_risk(truth: Truth, label: str) -> float:
    """The share of samples in which a label's bound may fail: `ONE_SIDED`, divided by its rounds of questions."""
    return ONE_SIDED / max(1, sum(label in design.edges or design.head is None for design in truth.designs))


def _find_lowest(table: CellTable, target: float, wrong_answers: float, alpha: float) -> int | None:
    """The index of the lowest threshold above which the precision is shown to be at least `target`, or None."""
    share = target_of_answers(target, wrong_answers)
    last = table.size.shape[1]
    above = [table.join_regions(region, last) for region in range(1, last)]
    single = np.asarray([len(cells.size) == 1 for cells in above])
    counts = np.asarray([[cells.total, cells.drawn.sum(), cells.right.sum()] for cells in above])
    sizes, drawn, right = counts.T
    enough = is_enough(sizes, drawn)
    passes = single & enough & reaches(sizes, drawn, right, share, alpha)
    for index, cells in enumerate(above):
        if passes[index]:
            return index
        estimate = cells.estimate_right() / max(cells.total, 1)
        if (
            enough[index]
            and not single[index]
            and estimate >= target
            and bound_precision(cells, wrong_answers, alpha, noisy=False) >= target
        ):
            return index
    return None


def _choose_best_f1(table: CellTable) -> int | None:
    """The index of the threshold with the best estimated F1, or None if no answer is right."""
    last = table.size.shape[1]
    positives = table.join_regions(0, last).estimate_right()
    found = []
    for region in range(1, last):
        above = table.join_regions(region, last)
        found.append(2 * above.estimate_right() / max(above.total + positives, 1) if above.total else 0.0)
    best = np.nan_to_num(np.asarray(found))
    return int(np.argmax(best)) if best.any() else None


def _confirm_written(
    output: TaggedOutput, truth: Truth, found: list[LabelCalibration], target: float, wrong_answers: float
) -> list[LabelCalibration]:
    """Drop calibrations whose precision is not shown for the images on which the label is really written.

    `top_k` keeps labels from images, and which ones depends on the scores of all labels. If a calibration is dropped,
    the others are looked at again.
    """
    if output.labels.top_k is None or output.labels.top_k >= len(found):
        return found
    while True:
        rows = np.asarray([row for row, one in enumerate(found) if one.accept is not None], np.int64)
        if not len(rows):
            return found
        labels = make_label_set(output, found)
        tables = count_cells(output, truth, rows, WrittenRegions(labels), _build_head(output, labels))
        dropped = [
            row
            for row, table in zip(rows.tolist(), tables, strict=True)
            if bound_precision(
                table.join_single(ACCEPT), wrong_answers, _share_risk(truth, found[row].label), noisy=False
            )
            < target
        ]
        if not dropped:
            return found
        for row in dropped:
            found[row] = LabelCalibration(found[row].label, found[row].answers, found[row].right, crowded_out=True)


def _logit(score: float) -> float:
    return math.log(score / (1 - score))


def _round_down(score: float) -> float:
    """Round down to five significant digits of the score, or of its distance from 1 if that is smaller.

    An image at the threshold still reaches it, 1e-6 does not become 0, and 0.999999 does not become 0.99999. A score
    that is 0 as float32 becomes 0.
    """
    if not np.float32(score):
        return 0.0
    nearest = min(score, 1 - score)
    if nearest <= 0:
        return float(score)
    digits = 4 - math.floor(math.log10(nearest))
    return max(0.0, min(float(score), float(f"{math.floor(score * 10**digits) / 10**digits:.{digits}f}")))


def _build_head(output: TaggedOutput, labels: LabelSet) -> LinearHead:
    return build_head(labels, output.head.vectors, output.table.scale, output.weights)


def _replace_calibrations(labels: LabelSet, fitted: Sequence[Calibration | None]) -> LabelSet:
    names = tuple(
        label.model_copy(update={"calibration": calibration})
        for label, calibration in zip(labels.names, fitted, strict=True)
    )
    return labels.model_copy(update={"names": names})
