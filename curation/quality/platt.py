"""Platt scaling: turn a label's logit into the logit of a probability, from answers."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from curation.estimates.confidence import Doubles

PRIOR_DEVIATION = 2.0
"""Standard deviation of the prior of a label's bias, in logits, and four times that of its log scale.

The prior's mean is the calibration of all labels together, so that a label with few answers has about that calibration.
"""


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
