"""Logistic regressions of one label's answers on embeddings and the label's logit, and their held-out predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.estimates.confidence import Doubles

EMBEDDING_SCALE = 10.0
"""Embeddings are multiplied by this factor before training. They have unit norm, so that weights that separate two
labels are in the tens; without the factor, the penalty on such weights would prevent any separation."""
LOGIT_DEVIATION = 10.0
"""The label's logit is scaled to this standard deviation, so that the penalty on its weight is small: a regression on
few answers follows the label's prompts."""
_NO_PENALTY = 1e3
"""An inverse regularization strength (C) with almost no penalty, which keeps separable answers from diverging."""


@dataclass(frozen=True)
class Examples:
    """The answers about one label as training examples: A answers, embeddings of D dimensions and unit norm.

    `logits` (A,) are the label's own logits. `weight` is what an answer counts in training; sums of it are numbers of
    answers.
    """

    embeddings: Doubles  # (A, D)
    logits: Doubles  # (A,)
    right: NDArray[np.bool_]  # (A,)
    weight: Doubles  # (A,)

    def inputs(self) -> Doubles:
        """The inputs of a regression, (A, D + 1): scaled embeddings and the standardized logit."""
        mean, deviation = self._standardize()
        return np.column_stack(
            [self.embeddings * EMBEDDING_SCALE, (self.logits - mean) * (LOGIT_DEVIATION / deviation)]
        )

    def fit(self, strength: float) -> tuple[Doubles, float, float]:
        """Fit all answers: weights (D,) of the embedding, the weight of the logit, and the bias.

        The logit of a right answer is `embedding @ weights + slope * logit + bias`. `strength` is the inverse
        regularization strength, scikit-learn's C.
        """
        model = _fit(self.inputs(), self.right, self.weight, strength)
        mean, deviation = self._standardize()
        slope = float(model.coef_[0, -1]) * LOGIT_DEVIATION / deviation
        weights = np.asarray(model.coef_[0, :-1] * EMBEDDING_SCALE, np.float64)
        return weights, slope, float(model.intercept_[0]) - slope * mean

    def predict_held_out(
        self, folds: NDArray[np.int64], strengths: Sequence[float], training: NDArray[np.bool_] | None = None
    ) -> Doubles:
        """Predict the logit of each answer by the regression on the other folds: (S, A), a row for each strength.

        `folds` (A,) numbers the answers' folds. Whichever fold is left out, the others must hold a right and a wrong
        answer (`assign_folds` sees to it). Only the answers in `training` (A,), or all, train regressions.
        """
        inputs = self.inputs()
        used = np.ones(len(folds), bool) if training is None else training
        found = np.empty((len(strengths), len(folds)))
        for fold in np.unique(folds):
            held = folds == fold
            others = used & ~held
            for row, strength in enumerate(strengths):
                model = _fit(inputs[others], self.right[others], self.weight[others], strength)
                found[row, held] = model.decision_function(inputs[held])
        return found

    def losses(self, logits: Doubles) -> Doubles:
        """The weighted log loss of each answer for predicted logits (..., A)."""
        return np.asarray(self.weight * np.logaddexp(0, np.where(self.right, -logits, logits)), np.float64)

    def compute_p_value(self, logits: Doubles, groups: NDArray[np.int64]) -> float:
        """Compute a p-value: whether held-out logits (A,) say more about the answers than the label's own logit.

        One-sided score test: the hypothesis is that the probability of a right answer is a logistic function of the
        label's own logit. The statistic is the covariance of the answers' residuals from this function with the
        residuals of `logits` from a line in the label's own logit, divided by its standard deviation: the larger one of
        that by the hypothesis and that of the sums over `groups` (A,). As `logits` are predicted without the answers
        that they are compared with, the statistic is about normal under the hypothesis (Lundborg, Kim, Shah and
        Samworth 2024). Weights are ignored: the hypothesis holds however the images were drawn.
        """
        mean, deviation = self._standardize()
        own = (self.logits - mean) / deviation
        model = _fit(own[:, None], self.right, np.ones(len(own)), _NO_PENALTY)
        expected = model.predict_proba(own[:, None])[:, 1]
        variance = expected * (1 - expected)
        line = np.column_stack([np.ones(len(own)), own])
        root = np.sqrt(variance)
        fitted = np.linalg.lstsq(line * root[:, None], logits * root, rcond=None)[0]
        beyond = logits - line @ fitted
        terms = (self.right - expected) * beyond
        _, position = np.unique(groups, return_inverse=True)
        spread = max(
            float(np.square(np.bincount(position, weights=terms)).sum()), float((variance * np.square(beyond)).sum())
        )
        statistic = float(terms.sum()) / math.sqrt(spread) if spread > 0 else 0.0
        return math.erfc(statistic / math.sqrt(2)) / 2

    def _standardize(self) -> tuple[float, float]:
        return float(self.logits.mean()), max(float(self.logits.std()), 1e-6)


def _fit(inputs: Doubles, right: NDArray[np.bool_], weight: Doubles, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=1000).fit(inputs, right, weight)
