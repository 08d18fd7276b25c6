"""Probes: a label as a logistic regression on embeddings, trained from answers, where it beats the label's prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curation.calibration import effective
from curation.evaluation import Doubles, group_answers
from curation.tagged_output import TaggedOutput
from curation.truth import Truth
from siglip.labels import LabelSet, Probe
from siglip.scoring import Floats

FOLDS = 5
LEAST = 10
"""Answers of each kind that a probe is trained from at least: two in each fold."""
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of regularization that are tried: scikit-learn's C, on embeddings times `SPREAD`."""
SPREAD = 10.0
"""Embeddings are of unit norm, so that weights which tell two labels apart are in the tens: a penalty on those would be
one on any answer at all."""


@dataclass(frozen=True)
class LabelProbe:
    """A label's comparison on answers that trained nothing: average precision of its prompts, and of a probe.

    `probe` is there where it is better by more than `gain`; `reason` says why not where it is not.
    """

    label: str
    answers: int
    right: int
    before: float
    after: float
    probe: Probe | None
    reason: str = ""


def train_probes(output: TaggedOutput, truth: Truth, gain: float = 0.01, seed: int = 0) -> list[LabelProbe]:
    """For each label with answers a probe, kept where cross-validation finds it better than the label as it is.

    Trained on the label's answers with their weights, and starting from what the prompts say: the zero-shot logit is an
    input beside the embedding, so that with few answers the probe is little else. Average precision is on held-out
    folds, by image; the strength of regularization is chosen within each fold's own answers. What a probe says of
    images unlike those that were answered about is not known.
    """
    names = output.labels.names
    zero_shot = output.head.logits(truth.embeddings).astype(np.float64)
    folds = np.random.default_rng(seed).permutation(len(truth.positions)) % FOLDS
    found = []
    for row, asked in enumerate(group_answers(truth, len(names))):
        if len(asked):
            images = truth.image[asked]
            examples = _Examples(
                truth.embeddings[images].astype(np.float64),
                zero_shot[images, row],
                truth.right[asked],
                effective(truth.weight[asked]),
                folds[images],
            )
            found.append(_train_label(output, row, names[row].name, examples, gain))
    return found


def make_label_set(labels: LabelSet, found: Sequence[LabelProbe]) -> LabelSet:
    """The label set with the probes that are better. Such a label's threshold, bands and calibration were for its
    prompts' scores, and are dropped."""
    probes = {one.label: one.probe for one in found if one.probe is not None}
    dropped = {"prompts": (), "calibration": None, "threshold": None, "accept": None}
    names = tuple(
        label.model_copy(update={**dropped, "probe": probes[label.name]}) if label.name in probes else label
        for label in labels.names
    )
    return LabelSet.model_validate(labels.model_copy(update={"names": names}).model_dump())


@dataclass(frozen=True)
class _Examples:
    embeddings: Doubles  # (A, D)
    zero_shot: Doubles  # (A,), logits
    right: NDArray[np.bool_]
    weight: Doubles
    folds: NDArray[np.int64]

    def pick(self, which: NDArray[np.bool_]) -> _Examples:
        return _Examples(
            self.embeddings[which], self.zero_shot[which], self.right[which], self.weight[which], self.folds[which]
        )

    def has_both(self, least: int = 1) -> bool:
        return min(int(self.right.sum()), int((~self.right).sum())) >= least


def _train_label(output: TaggedOutput, row: int, name: str, examples: _Examples, gain: float) -> LabelProbe:
    count, right = len(examples.right), int(examples.right.sum())
    if not examples.has_both(LEAST):
        few = "right" if right < LEAST else "wrong"
        return LabelProbe(name, count, right, math.nan, math.nan, None, f"fewer than {LEAST} answers are {few}")
    scores = np.zeros(count)
    for fold in range(FOLDS):
        held = examples.folds == fold
        training = examples.pick(~held)
        if held.any():
            weights, bias = _fit(output, row, training, _choose_strength(output, row, training))
            scores[held] = examples.embeddings[held] @ weights + bias
    before = _precision(examples, examples.zero_shot)
    after = _precision(examples, scores)
    if after < before + gain:
        return LabelProbe(name, count, right, before, after, None, "no better than the label as it is")
    weights, bias = _fit(output, row, examples, _choose_strength(output, row, examples))
    probe = Probe.of(np.asarray(weights, np.float32), bias, output.weights)
    return LabelProbe(name, count, right, before, after, probe)


def _choose_strength(output: TaggedOutput, row: int, examples: _Examples) -> float:
    """The strength with the least weighted log loss on folds of these examples."""
    losses = dict.fromkeys(STRENGTHS, 0.0)
    for fold in np.unique(examples.folds):
        held = examples.folds == fold
        training, judges = examples.pick(~held), examples.pick(held)
        if not training.has_both():
            continue
        for strength in STRENGTHS:
            weights, bias = _fit(output, row, training, strength)
            margin = np.where(judges.right, 1, -1) * (judges.embeddings @ weights + bias)
            losses[strength] += float((judges.weight * np.logaddexp(0, -margin)).sum())
    return min(STRENGTHS, key=losses.__getitem__)


def _fit(output: TaggedOutput, row: int, examples: _Examples, strength: float) -> tuple[Doubles, float]:
    """Weights (D,) and bias on embeddings. The zero-shot logit is linear in the embedding, and folds into them."""
    from sklearn.linear_model import LogisticRegression

    if not examples.has_both():
        return _vector(output, row)
    inputs = np.column_stack([examples.embeddings * SPREAD, examples.zero_shot])
    model = LogisticRegression(C=strength, max_iter=1000).fit(inputs, examples.right, examples.weight)
    direction, offset = _vector(output, row)
    weights = model.coef_[0, :-1] * SPREAD + model.coef_[0, -1] * direction
    return np.asarray(weights, np.float64), float(model.intercept_[0] + model.coef_[0, -1] * offset)


def _vector(output: TaggedOutput, row: int) -> tuple[Doubles, float]:
    """A label's own logit as weights and bias on embeddings."""
    head = output.head
    weights: Floats = head.gain[row] * head.vectors[row]
    return weights.astype(np.float64), float(head.offset[row])


def _precision(examples: _Examples, scores: Doubles) -> float:
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(examples.right, scores, sample_weight=examples.weight))
