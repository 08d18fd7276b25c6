"""Linear heads: one matrix that scores embeddings for a label set, from prompts, probes and calibrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from siglip.checkpoints.files import shorten_identity
from siglip.labels import LabelError, LabelSet
from siglip.scoring import Floats, Scale, Selection, multiply, select, sigmoid, softmax


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier on embeddings of unit norm, with one row for each of L labels.

    `vectors` is float32 (L, D) of unit norm: the averaged prompts of a zero-shot label, or the direction of a probe's
    weights. `gain` and `offset` are float32 (L,). A label's logit is `gain * cosine + offset`; they contain the
    checkpoint's scale and bias and the label's calibration. `groups` are the indices of labels of which exactly one is
    true.
    """

    vectors: Floats
    gain: Floats
    offset: Floats
    groups: tuple[tuple[int, ...], ...] = ()

    def logits(self, embeddings: Floats) -> Floats:
        """Logits of embeddings (N, D), float32 (N, L). An image's logits do not depend on the rest of the batch."""
        return np.asarray(self.gain * multiply(embeddings, self.vectors) + self.offset, dtype=np.float32)

    def scores(self, embeddings: Floats) -> Floats:
        """Probabilities for embeddings (N, D), float32 (N, L): independent, but within a group they add up to 1."""
        logits = self.logits(embeddings)
        scores = sigmoid(logits)
        for group in self.groups:
            scores[:, group] = softmax(logits[:, group])
        return scores


def build_head(labels: LabelSet, texts: Floats, scale: Scale, weights: str) -> LinearHead:
    """Build the head of a label set for one model.

    `texts` are the averaged prompts, (L, D); the rows of labels with a probe are ignored. `scale` is the checkpoint's.
    `weights` is the model's digest, `siglip.checkpoint.PinnedModel.identity`. Raises `LabelError` for a probe or a
    calibration that was made from another model's embeddings.
    """
    check_model(labels, weights, texts.shape[1])
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
    return LinearHead(vectors, np.asarray(gain, np.float32), np.asarray(offset, np.float32), groups)


def check_model(labels: LabelSet, weights: str, width: int) -> None:
    """Raise `LabelError` for a probe or a calibration of another model than `weights`, or a probe of other D.

    Calibrations of hand-written label sets, and of earlier versions, name no model. They are not checked.
    """
    for label in labels.names:
        if label.probe is not None and (label.probe.model != weights or label.probe.width != width):
            raise LabelError(
                f"labels: the probe of {label.name!r} was trained on embeddings of the model "
                f"{shorten_identity(label.probe.model)}, and this one is {shorten_identity(weights)}: train it again, "
                "or give the label prompts"
            )
        if label.calibration is not None and label.calibration.model not in (None, weights):
            raise LabelError(
                f"labels: the calibration of {label.name!r} was fitted on scores of the model "
                f"{shorten_identity(label.calibration.model)}, and this one is {shorten_identity(weights)}: calibrate "
                "on an output of this model, or remove the calibrations and the accept thresholds that go with them"
            )


def tag_embeddings(embeddings: Floats, labels: LabelSet, head: LinearHead) -> Selection:
    """Tag embeddings (N, D) with a label set and its head: labels that reach their thresholds, best first."""
    return select(head.scores(embeddings), np.asarray(labels.thresholds(), np.float32), labels.top_k)


def name_bands(chosen: Sequence[int] | NDArray[np.intp], scores: Floats, accepts: Floats) -> NDArray[np.str_]:
    """The band of each selected label, `accept` or `review`. `chosen` are label indices with these `scores`.

    `accepts` are the `accept_thresholds` of the label set: a score reaches `accept` at its label's value.
    """
    return np.where(scores >= accepts[chosen], "accept", "review")


def accept_thresholds(labels: LabelSet) -> Floats:
    """The `accept` value of each label, float32 (L,): infinite for a label without one."""
    return np.asarray([np.inf if accept is None else accept for accept in labels.accepts()], np.float32)
