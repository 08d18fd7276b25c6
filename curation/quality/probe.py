"""Linear probes: replace a label's prompts by a logistic regression on embeddings, where that is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from curation.estimates.confidence import Doubles
from curation.quality.groups import assign_folds, count_groups
from curation.quality.independence import make_fingerprint
from curation.quality.regression import Examples
from curation.quality.truth import Truth, group_answers
from curation.tagged_output import TaggedOutput
from siglip.label_text.fitted import Probe
from siglip.labels import LabelSet

FOLDS = 5
MIN_ANSWERS = 10
"""A probe needs right answers about at least this many groups of images, and wrong answers about as many: on average
two groups of each in each fold."""
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""The inverse regularization strengths (scikit-learn's C) to choose from."""
LEVEL = 0.05
"""A probe is kept when its p-value is at most this. In simulations (`python -m benchmarks.probe`), at most 4 % of the
labels whose prompts nothing beats got a probe, as the gain is required too."""


@dataclass(frozen=True)
class LabelProbe:
    """The comparison of one label's prompts with a probe, on held-out answers.

    `before` is the average precision of the label as it is, `after` that of a probe. `chance` is the probability
    of such held-out logits if nothing beat the prompts. All three are NaN when there are too few answers. `probe` is
    None unless the probe is kept; `reason` then says why it is not. `fingerprint` is that of the answers.
    """

    label: str
    answers: int
    right: int
    before: float
    after: float
    chance: float
    probe: Probe | None
    reason: str = ""
    fingerprint: str = ""


@dataclass(frozen=True)
class Comparison:
    """Average precision by the label's own logit (`before`) and by the held-out logits of a probe (`after`).

    `chance` is the p-value of `Examples.compute_p_value`. `strength` is the regularization strength with the lowest
    held-out loss.
    """

    before: float
    after: float
    chance: float
    strength: float


def train_probes(
    output: TaggedOutput, truth: Truth, groups: NDArray[np.int64], gain: float = 0.01, seed: int = 0
) -> list[LabelProbe]:
    """Train a probe for each label that has answers, and keep it when it beats the label's prompts.

    A probe is a logistic regression on the embedding and the zero-shot logit, so that it can rely on the label's
    prompts when there are few answers. It is kept when its held-out average precision is higher by at least `gain`, and
    when its held-out logits say more about the answers than the prompts' logit, and not by chance (`compare`). `groups`
    (M,) are the groups of the answered images (`curation.quality.groups`): images of one group are never on both sides
    of a comparison.

    A label needs right answers about images of at least ten groups, and wrong answers about as many. It is not known
    how a probe scores images that differ from those that were answered about.
    """
    names = output.labels.names
    zero_shot = output.head.logits(truth.embeddings).astype(np.float64)
    found = []
    for row, answers in enumerate(group_answers(truth, len(names))):
        if len(answers):
            images = truth.image[answers]
            examples = Examples(
                truth.embeddings[images].astype(np.float64),
                zero_shot[images, row],
                truth.right[answers],
                np.ones(len(answers)),
            )
            trained = _train_label(output, row, examples, groups[images], truth.weight[answers], gain, seed)
            found.append(replace(trained, fingerprint=make_fingerprint(truth, row)))
    return found


def make_label_set(labels: LabelSet, found: Sequence[LabelProbe]) -> LabelSet:
    """Return the label set with the probes that are better than the label's prompts.

    The prompts, threshold, `accept` and calibration of these labels are removed, because they were for the prompts'
    scores. `trained_by` remembers the answers, which must not calibrate or judge the probe.
    """
    probes = {one.label: one for one in found if one.probe is not None}
    dropped = {"prompts": (), "calibration": None, "threshold": None, "accept": None, "chosen_by": None}
    names = tuple(
        label.model_copy(update={**dropped, "probe": one.probe, "trained_by": one.fingerprint})
        if (one := probes.get(label.name)) is not None
        else label
        for label in labels.names
    )
    return LabelSet.model_validate(labels.model_copy(update={"names": names}).model_dump())


def compare(examples: Examples, groups: NDArray[np.int64], weight: Doubles, seed: int = 0) -> Comparison:
    """Compare the label's own logit with a probe, by cross-validation over groups of images (A,).

    The regularization strength for a fold is that with the lowest log loss in the other folds. Average precision counts
    answers with their `weight` (A,), the number of images that they stand for. In training and in the test all answers
    count the same, because the probability of an answer does not depend on how its image was drawn.
    """
    from sklearn.metrics import average_precision_score

    folds = assign_folds(groups, examples.right, min(FOLDS, *count_groups(groups, examples.right)), seed)
    logits = examples.predict_held_out(folds, STRENGTHS)
    losses = examples.losses(logits)
    chosen = np.empty(len(folds))
    for fold in np.unique(folds):
        held = folds == fold
        chosen[held] = logits[losses[:, ~held].sum(axis=1).argmin(), held]
    return Comparison(
        float(average_precision_score(examples.right, examples.logits, sample_weight=weight)),
        float(average_precision_score(examples.right, chosen, sample_weight=weight)),
        examples.compute_p_value(chosen, groups),
        STRENGTHS[int(losses.sum(axis=1).argmin())],
    )


def _train_label(
    output: TaggedOutput,
    row: int,
    examples: Examples,
    groups: NDArray[np.int64],
    weight: Doubles,
    gain: float,
    seed: int,
) -> LabelProbe:
    name, count, right = output.labels.names[row].name, len(examples.right), int(examples.right.sum())
    for kind, found in zip(("right", "wrong"), count_groups(groups, examples.right), strict=True):
        if found < MIN_ANSWERS:
            few = f"the {kind} answers are about fewer than {MIN_ANSWERS} groups of images"
            return LabelProbe(name, count, right, math.nan, math.nan, math.nan, None, few)
    compared = compare(examples, groups, weight, seed)
    figures = (name, count, right, compared.before, compared.after, compared.chance)
    if compared.after < compared.before + gain or compared.after <= compared.before:
        return LabelProbe(*figures, None, "no better than the label as it is")
    if compared.chance > LEVEL:
        return LabelProbe(*figures, None, f"the gain may be chance (p = {compared.chance:.2f})")
    weights, slope, bias = examples.fit(compared.strength)
    direction, offset = output.head.gain[row] * output.head.vectors[row].astype(np.float64), output.head.offset[row]
    probe = Probe.of(np.asarray(weights + slope * direction, np.float32), float(bias + slope * offset), output.weights)
    return LabelProbe(*figures, probe)
