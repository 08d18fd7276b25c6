"""Suspects: answers that may themselves be wrong, because the model contradicts them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from curation.quality.truth import Truth, group_answers
from curation.tagged_output import TaggedOutput


@dataclass(frozen=True)
class Suspect:
    """An answer that the model contradicts, and that may be wrong.

    `margin` is how far the answer's logit lies beyond the mean logit of the label's opposite answers, in standard
    deviations of those.
    """

    id: str
    key: str
    label: str
    answer: str
    score: float
    margin: float


def find_suspects(output: TaggedOutput, truth: Truth) -> list[Suspect]:
    """Find answers that the model contradicts, the strongest contradiction first.

    The criterion is that of confident learning (Northcutt, Jiang and Chuang 2021): an answer is suspect when the
    model's logit for it is at least as extreme as the mean logit of the label's opposite answers. Suspects are ranked
    by the distance from that mean in standard deviations of the opposite answers, so that labels with large scores do
    not fill the list. A label whose answers are all alike has no suspects.
    """
    logits = truth.logits(output).astype(np.float64)
    scores = output.head.scores(truth.embeddings)[truth.image, truth.label]
    names = output.labels.label_names()
    margins = np.full(len(logits), -math.inf)
    for answers in group_answers(truth, len(names)):
        for answer in (True, False):
            alike = answers[truth.right[answers] == answer]
            opposite = logits[answers[truth.right[answers] != answer]]
            if len(alike) and len(opposite) > 1:
                distance = (logits[alike] - opposite.mean()) / max(opposite.std(ddof=1), 1e-6)
                margins[alike] = -distance if answer else distance
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
