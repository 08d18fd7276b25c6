"""Linear probes: replace a label's prompts by a logistic regression on embeddings, where that is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curation.estimates.confidence import Doubles
from curation.quality.platt import effective_weights
from curation.quality.truth import Truth, group_answers
from curation.tagged_output import TaggedOutput
from siglip.labels import LabelSet, Probe
from siglip.scoring import Floats

FOLDS = 5
MIN_ANSWERS = 10
"""A probe is trained from at least this many right and this many wrong answers: on average two of each in each fold."""
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""The inverse regularization strengths (scikit-learn's C) to choose from, for embeddings times `EMBEDDING_SCALE`."""
EMBEDDING_SCALE = 10.0
"""Embeddings are multiplied by this factor before training. They have unit norm, so that weights that separate two
labels are in the tens; without the factor, the penalty on such weights would prevent any separation."""


@dataclass(frozen=True)
class LabelProbe:
    """The comparison of one label's prompts with a probe, on held-out answers.

    `before` is the average precision of the label as it is, `after` that of a probe. Both are NaN when there are too
    few answers. `probe` is None unless the probe is better by at least `gain`; `reason` then says why.
    """

    label: str
    answers: int
    right: int
    before: float
    after: float
    probe: Probe | None
    reason: str = ""


def train_probes(output: TaggedOutput, truth: Truth, gain: float = 0.01, seed: int = 0) -> list[LabelProbe]:
    """Train a probe for each label that has answers, and keep it when it beats the label's prompts by `gain`.

    The inputs of the regression are the embedding and the zero-shot logit, so that a probe can rely on the label's
    prompts when there are few answers. Answers count with their weights. Average precision is measured by
    cross-validation by image; the regularization strength is chosen from the training answers of each fold. It is not
    known how a probe scores images that differ from those that were answered about.
    """
    names = output.labels.names
    zero_shot = output.head.logits(truth.embeddings).astype(np.float64)
    folds = np.random.default_rng(seed).permutation(len(truth.positions)) % FOLDS
    found = []
    for row, answers in enumerate(group_answers(truth, len(names))):
        if len(answers):
            images = truth.image[answers]
            examples = _Examples(
                truth.embeddings[images].astype(np.float64),
                zero_shot[images, row],
                truth.right[answers],
                effective_weights(truth.weight[answers]),
                folds[images],
            )
            found.append(_train_label(output, row, names[row].name, examples, gain))
    return found


def make_label_set(labels: LabelSet, found: Sequence[LabelProbe]) -> LabelSet:
    """Return the label set with the probes that are better than the label's prompts.

    The prompts, threshold, `accept` and calibration of these labels are removed, because they were for the prompts'
    scores.
    """
    probes = {one.label: one.probe for one in found if one.probe is not None}
    dropped = {"prompts": (), "calibration": None, "threshold": None, "accept": None}
    names = tuple(
        label.model_copy(update={**dropped, "probe": probes[label.name]}) if label.name in probes else label
        for label in labels.names
    )
    return LabelSet.model_validate(labels.model_copy(update={"names": names}).model_dump())


@dataclass(frozen=True)
class _Examples:
    """The answers about one label, as training examples: A answers, embeddings of D dimensions."""

    embeddings: Doubles  # (A, D)
    zero_shot: Doubles  # (A,), logits
    right: NDArray[np.bool_]
    weight: Doubles
    folds: NDArray[np.int64]

    def pick(self, which: NDArray[np.bool_]) -> _Examples:
        return _Examples(
            self.embeddings[which], self.zero_shot[which], self.right[which], self.weight[which], self.folds[which]
        )

    def has_both(self, minimum: int = 1) -> bool:
        return min(int(self.right.sum()), int((~self.right).sum())) >= minimum


def _train_label(output: TaggedOutput, row: int, name: str, examples: _Examples, gain: float) -> LabelProbe:
    count, right = len(examples.right), int(examples.right.sum())
    if not examples.has_both(MIN_ANSWERS):
        few = "right" if right < MIN_ANSWERS else "wrong"
        return LabelProbe(name, count, right, math.nan, math.nan, None, f"fewer than {MIN_ANSWERS} answers are {few}")
    scores = np.zeros(count)
    for fold in range(FOLDS):
        held = examples.folds == fold
        training = examples.pick(~held)
        if held.any():
            weights, bias = _fit(output, row, training, _choose_strength(output, row, training))
            scores[held] = examples.embeddings[held] @ weights + bias
    before = _average_precision(examples, examples.zero_shot)
    after = _average_precision(examples, scores)
    if after < before + gain:
        return LabelProbe(name, count, right, before, after, None, "no better than the label as it is")
    weights, bias = _fit(output, row, examples, _choose_strength(output, row, examples))
    probe = Probe.of(np.asarray(weights, np.float32), bias, output.weights)
    return LabelProbe(name, count, right, before, after, probe)


def _choose_strength(output: TaggedOutput, row: int, examples: _Examples) -> float:
    """Choose the regularization strength with the lowest weighted log loss in cross-validation on these examples."""
    losses = dict.fromkeys(STRENGTHS, 0.0)
    for fold in np.unique(examples.folds):
        held = examples.folds == fold
        training, held_out = examples.pick(~held), examples.pick(held)
        if not training.has_both():
            continue
        for strength in STRENGTHS:
            weights, bias = _fit(output, row, training, strength)
            margin = np.where(held_out.right, 1, -1) * (held_out.embeddings @ weights + bias)
            losses[strength] += float((held_out.weight * np.logaddexp(0, -margin)).sum())
    return min(STRENGTHS, key=losses.__getitem__)


def _fit(output: TaggedOutput, row: int, examples: _Examples, strength: float) -> tuple[Doubles, float]:
    """Fit a probe: weights (D,) and bias on embeddings. The zero-shot logit is linear in them, and merged into both."""
    from sklearn.linear_model import LogisticRegression

    if not examples.has_both():
        return _zero_shot_weights(output, row)
    inputs = np.column_stack([examples.embeddings * EMBEDDING_SCALE, examples.zero_shot])
    model = LogisticRegression(C=strength, max_iter=1000).fit(inputs, examples.right, examples.weight)
    direction, offset = _zero_shot_weights(output, row)
    weights = model.coef_[0, :-1] * EMBEDDING_SCALE + model.coef_[0, -1] * direction
    return np.asarray(weights, np.float64), float(model.intercept_[0] + model.coef_[0, -1] * offset)


def _zero_shot_weights(output: TaggedOutput, row: int) -> tuple[Doubles, float]:
    """The label's own logit as weights (D,) and bias on embeddings."""
    head = output.head
    weights: Floats = head.gain[row] * head.vectors[row]
    return weights.astype(np.float64), float(head.offset[row])


def _average_precision(examples: _Examples, scores: Doubles) -> float:
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(examples.right, scores, sample_weight=examples.weight))
