"""Suspects: answers that may themselves be wrong, because the model or a near-identical image contradicts them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curation.estimates.confidence import Doubles
from curation.quality.groups import NEAR_IDENTICAL, assign_folds, count_groups, group_near_identical
from curation.quality.regression import Examples
from curation.quality.truth import Truth, group_answers
from curation.tagged_output import TaggedOutput
from siglip.scoring import Floats

FOLDS = 5
STRENGTH = 0.03
"""The inverse regularization strength of the regressions (scikit-learn's C). 0.1 finds about as many planted wrong
answers (`python -m benchmarks.suspects`)."""
MAX_TRAINING = 2000
"""A regression is trained with at most this many right and this many wrong answers, drawn at random."""
NEIGHBOURS = 5
MIN_IMAGES = 50
"""Outliers are looked for among at least this many images."""
OUTLIER_SPREADS = 6.0
"""An image is an outlier when its mean cosine to its nearest neighbours lies this many standard deviations below the
median of all images. The standard deviation is estimated from the median absolute deviation."""
_BLOCK = 2048
"""Rows of a matrix of cosines that are computed at a time."""


@dataclass(frozen=True)
class Suspect:
    """An answer that may be wrong, and why.

    `margin` is the logit of the probability that the answer is wrong, by a regression that was not trained with it: 0
    when both answers are equally probable, and NaN when there was no regression. `kind` is `model`, `near-identical` or
    `outlier`, and `reason` says in words what speaks against the answer.
    """

    id: str
    key: str
    label: str
    answer: str
    score: float
    margin: float
    kind: str
    reason: str


def find_suspects(output: TaggedOutput, truth: Truth, most: int = 100, seed: int = 0) -> list[Suspect]:
    """Find answers that should be checked again, at most `most` of each kind, the kinds in this order:

    * `model`: the opposite answer is more probable, by a logistic regression on the embeddings and logits of the other
      answers about the label. The most probable contradiction comes first. This is the ranking by self-confidence of
      confident learning (Northcutt, Jiang and Chuang 2021), with held-out probabilities.
    * `near-identical`: a near-identical image has the opposite answer about the same label. Both answers are listed,
      the less probable ones first.
    * `outlier`: the image is far from all other answered images, so that what is known of them says little about it.
      Only the least probable answer about such an image is listed.

    An answer is listed once, as the first kind that it is of, with the reasons of all its kinds. Regressions are
    cross-validated over groups of near-identical images, so that no answer is judged by a copy of its own image. The
    answers' weights are ignored: the probability of an answer does not depend on how its image was drawn. A label has
    no suspects of the kind `model` when its right or its wrong answers are about a single group of images.
    """
    margins = measure_contradictions(output, truth, seed)
    ranked = np.argsort(-np.nan_to_num(margins, nan=-math.inf), kind="stable")
    scores = output.head.scores(truth.embeddings)[truth.image, truth.label]
    names = output.labels.label_names()
    kinds = {
        "model": {int(i): _describe_model(truth, margins, int(i)) for i in np.flatnonzero(margins >= 0)},
        "near-identical": _find_contradicting_images(truth, len(names)),
        "outlier": _find_outliers(truth, ranked),
    }
    found: list[Suspect] = []
    listed: set[int] = set()
    for kind, reasons in kinds.items():
        chosen = [i for i in map(int, ranked) if i in reasons and i not in listed][:most]
        listed.update(chosen)
        for i in chosen:
            image, label = truth.image[i], names[truth.label[i]]
            answer = "right" if truth.right[i] else "wrong"
            why = "; ".join(every[i] for every in kinds.values() if i in every)
            found.append(
                Suspect(
                    truth.ids[image], truth.keys[image], label, answer, float(scores[i]), float(margins[i]), kind, why
                )
            )
    return found


def measure_contradictions(output: TaggedOutput, truth: Truth, seed: int = 0) -> Doubles:
    """Measure the margin of each answer, float64 (A,): the logit of the probability that it is wrong.

    NaN for the answers about a label without a regression.
    """
    zero_shot = truth.logits(output).astype(np.float64)
    groups = group_near_identical(truth.embeddings)
    margins = np.full(len(zero_shot), math.nan)
    random = np.random.default_rng(seed)
    for answers in group_answers(truth, len(output.labels.names)):
        right, images = truth.right[answers], truth.image[answers]
        folds = min(FOLDS, *count_groups(groups[images], right))
        if folds > 1:
            weight, training = _draw_training(right, random)
            examples = Examples(truth.embeddings[images].astype(np.float64), zero_shot[answers], right, weight)
            assigned = assign_folds(groups[images], right, folds, seed)
            logits = examples.predict_held_out(assigned, [STRENGTH], training)[0]
            margins[answers] = np.where(right, -logits, logits)
    return margins


def _draw_training(right: NDArray[np.bool_], random: np.random.Generator) -> tuple[Doubles, NDArray[np.bool_]]:
    """Draw at most `MAX_TRAINING` answers of each kind. Returns their weights (A,) and which they are, bool (A,).

    The weights restore the share of right answers.
    """
    weight, training = np.ones(len(right)), np.zeros(len(right), bool)
    for answer in (True, False):
        alike = np.flatnonzero(right == answer)
        drawn = alike if len(alike) <= MAX_TRAINING else random.choice(alike, MAX_TRAINING, replace=False)
        training[drawn] = True
        weight[alike] = len(alike) / max(len(drawn), 1)
    return weight, training


def _describe_model(truth: Truth, margins: Doubles, answer: int) -> str:
    opposite = "wrong" if truth.right[answer] else "right"
    probability = 1 / (1 + math.exp(-min(margins[answer], 500)))
    shown = f"{probability:.0%}" if probability < 0.995 else "over 99%"
    given = "right" if truth.right[answer] else "wrong"
    return f"answered {given}, but the other answers about this label make {opposite} more probable: {shown}"


def _find_contradicting_images(truth: Truth, labels: int) -> dict[int, str]:
    """The answers for which a near-identical image has the opposite answer about the same label, each with a reason."""
    found: dict[int, str] = {}
    for answers in group_answers(truth, labels):
        right = answers[truth.right[answers]]
        wrong = answers[~truth.right[answers]]
        for one, other in ((right, wrong), (wrong, right)):
            if not len(other):
                continue
            for first in range(0, len(one), _BLOCK):
                block = one[first : first + _BLOCK]
                cosines = truth.embeddings[truth.image[block]] @ truth.embeddings[truth.image[other]].T
                nearest = cosines.argmax(axis=1)
                for row in np.flatnonzero(cosines.max(axis=1) >= NEAR_IDENTICAL):
                    twin = truth.image[other[nearest[row]]]
                    answer = "wrong" if truth.right[block[row]] else "right"
                    cosine = min(float(cosines[row, nearest[row]]), 1.0)
                    found[int(block[row])] = (
                        f"an image with nearly the same embedding (cosine {cosine:.3f}) was answered {answer}: "
                        f"{truth.keys[twin]} ({truth.ids[twin]})"
                    )
    return found


def _find_outliers(truth: Truth, ranked: NDArray[np.intp]) -> dict[int, str]:
    """The first answer in `ranked` about each outlier among the images, with a reason."""
    if len(truth.positions) < MIN_IMAGES:
        return {}
    closeness = _measure_closeness(truth.embeddings)
    median = float(np.median(closeness))
    deviation = 1.4826 * float(np.median(np.abs(closeness - median)))
    far = closeness < median - OUTLIER_SPREADS * deviation
    found: dict[int, str] = {}
    reported: set[int] = set()
    for answer in ranked[far[truth.image[ranked]]]:
        image = int(truth.image[answer])
        if image not in reported:
            reported.add(image)
            found[int(answer)] = (
                f"the image is far from all other answered images: mean cosine {closeness[image]:.2f} to the nearest "
                f"{NEIGHBOURS}, where {median:.2f} is usual"
            )
    return found


def _measure_closeness(embeddings: Floats) -> Doubles:
    """The mean cosine of each of M embeddings to its `NEIGHBOURS` nearest others, float64 (M,)."""
    found = np.empty(len(embeddings))
    for first in range(0, len(embeddings), _BLOCK):
        block = embeddings[first : first + _BLOCK]
        cosines = block @ embeddings.T
        cosines[np.arange(len(block)), np.arange(first, first + len(block))] = -2
        found[first : first + _BLOCK] = np.partition(cosines, -NEIGHBOURS, axis=1)[:, -NEIGHBOURS:].mean(axis=1)
    return found
