"""Heads: what a label set and a model make of an embedding. One matrix, whatever the labels are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from siglip.labels import LabelError, LabelSet
from siglip.scoring import Floats, Scale, multiply, sigmoid, softmax


@dataclass(frozen=True)
class Head:
    """A linear classifier on embeddings of unit norm, one row for each of L labels.

    `vectors` is float32 (L, D) of unit norm: the prompts' embedding of a zero-shot label, the direction of a probe's
    weights. `gain` and `offset` are float32 (L,): a label's logit is `gain * cosine + offset`, with the checkpoint's
    scale and bias and the label's calibration in them. `groups` are the indices of labels of which exactly one is true.
    """

    vectors: Floats
    gain: Floats
    offset: Floats
    groups: tuple[tuple[int, ...], ...] = ()

    def logits(self, embeddings: Floats) -> Floats:
        """Embeddings (N, D) to float32 (N, L). An image's are the same bits, whatever else is in the batch."""
        return np.asarray(self.gain * multiply(embeddings, self.vectors) + self.offset, dtype=np.float32)

    def scores(self, embeddings: Floats) -> Floats:
        """Embeddings (N, D) to probabilities, float32 (N, L): independent ones, but within a group they add up to 1."""
        logits = self.logits(embeddings)
        scores = sigmoid(logits)
        for group in self.groups:
            scores[:, group] = softmax(logits[:, group])
        return scores


def build_head(labels: LabelSet, texts: Floats, scale: Scale, weights: str) -> Head:
    """A label set for a model: `texts` are its prompts' averages (L, D), of which a probe's row is not looked at.

    `weights` is the model's digest, `siglip.checkpoint.PinnedModel.identity`. Raises `LabelError` for a probe that was
    trained on another model's embeddings.
    """
    check_probes(labels, weights, texts.shape[1])
    vectors = np.array(texts, np.float32)
    gain, offset = [], []
    for row, label in enumerate(labels.names):
        slope, bias = scale.logit_scale, scale.logit_bias
        if label.probe is not None:
            vector = label.probe.vector()
            slope, bias = float(np.linalg.norm(vector)), label.probe.bias
            vectors[row] = vector / slope
        if label.calibration is not None:
            slope *= label.calibration.scale
            bias = label.calibration.scale * bias + label.calibration.bias
        gain.append(slope)
        offset.append(bias)
    groups = tuple(labels.positions(members) for members in labels.groups.values())
    return Head(vectors, np.asarray(gain, np.float32), np.asarray(offset, np.float32), groups)


def check_probes(labels: LabelSet, weights: str, width: int) -> None:
    """Raises `LabelError` for a probe that was trained on embeddings (D,) of another model than `weights`."""
    for label in labels.names:
        if label.probe is not None and (label.probe.model != weights or label.probe.width != width):
            raise LabelError(
                f"labels: the probe of {label.name!r} was trained on embeddings of the model {label.probe.model[:16]}, "
                f"and this one is {weights[:16]}: train it again, or give the label prompts"
            )


def name_bands(scores: Floats, chosen: Sequence[int], accepts: Sequence[float | None]) -> list[str]:
    """For one image's written labels, `chosen` of the set with their `scores`: accept, or review."""
    return [
        "accept" if (bar := accepts[index]) is not None and score >= bar else "review"
        for index, score in zip(chosen, scores, strict=True)
    ]
