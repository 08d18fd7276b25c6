"""`sightline model compare`: two models on the same images. Embeddings, labels and speed beside each other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip.checkpoint import PinnedModel
from siglip.checkpoints.fidelity import count_relabelled, measure_cosines
from siglip.config import ImageSpec, Limits, count_cores
from siglip.encoder import Encoder
from siglip.heads import LinearHead, build_head
from siglip.images.decode import Decoded, ImageRejected
from siglip.images.decoder import DecoderRing
from siglip.labels import LabelSet
from siglip.scoring import Floats
from storage.store import show

PERCENTS = (0, 1, 5, 50)
"""The percentiles of the cosines that are told. 0 is the lowest."""
CALL_BATCHES = 4
"""Batches that a model embeds in its turn, before it is the other model's turn."""


@dataclass
class ComparedModel:
    """One of the two models, loaded: its `name` for people, its `head` if there are labels, and its `seconds` of work.

    Its settings are those of `pinned`. It embeds on the threads that torch is set to.
    """

    name: str
    pinned: PinnedModel
    encoder: Encoder
    head: LinearHead | None
    seconds: float = 0.0

    @classmethod
    def load(cls, name: str, pinned: PinnedModel, labels: LabelSet | None) -> ComparedModel:
        """Load a model and embed the labels. Raises `CheckpointError` and `LabelError`."""
        encoder = Encoder(pinned, texts=labels is not None)
        head = None
        if labels is not None:
            head = build_head(labels, encoder.embed_labels(labels), encoder.scale, pinned.identity)
        encoder.warm_up()
        return cls(name, pinned, encoder, head)

    def embed(self, pixels: NDArray[np.uint8]) -> Floats:
        """Embed images, and count the time."""
        start = time.perf_counter()
        vectors = self.encoder.embed_images(pixels)
        self.seconds += time.perf_counter() - start
        return vectors

    def describe(self, images: int) -> dict[str, Any]:
        """What it is, and its speed for this many images, without decoding."""
        return {
            "name": self.name,
            "checkpoint": self.pinned.identity,
            "dtype": str(self.encoder.dtype).removeprefix("torch."),
            "compiled": self.encoder.compiled,
            "batch_size": self.encoder.batch_size,
            "images_per_second": round(images / max(self.seconds, 1e-9), 3),
        }


@dataclass
class Comparison:
    """What was found. `images` were compared, and `rejected` could not be decoded: (name, reason, detail). Names are
    printable.

    `cosines` are those of each image's two embeddings, float32 (N,), or None for two different checkpoints: their
    embeddings are in different spaces. With labels, `agreeing` images have the same best label, and `relabelled` images
    get other labels by the label set's thresholds; `differences` are the largest and the mean one of all scores.
    """

    models: tuple[ComparedModel, ComparedModel]
    images: int = 0
    rejected: list[tuple[str, str, str]] = field(default_factory=list)
    cosines: Floats | None = None
    agreeing: int | None = None
    relabelled: int | None = None
    differences: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        found: dict[str, Any] = {
            "models": [model.describe(self.images) for model in self.models],
            "images": self.images,
            "rejected": [dict(zip(("image", "reason", "detail"), item, strict=True)) for item in self.rejected],
            "cosines": None,
            "labels": None,
        }
        if self.cosines is not None:
            lowest, *others = (round(float(value), 6) for value in np.percentile(self.cosines, PERCENTS))
            named = {f"p{percent}": value for percent, value in zip(PERCENTS[1:], others, strict=True)}
            found["cosines"] = {"min": lowest, **named, "mean": round(float(self.cosines.mean(dtype=np.float64)), 6)}
        if self.differences is not None:
            found["labels"] = {
                "best_label_agrees": self.agreeing,
                "relabelled": self.relabelled,
                "largest_score_difference": round(self.differences[0], 6),
                "mean_score_difference": round(self.differences[1], 6),
            }
        return found


def compare_models(
    models: tuple[ComparedModel, ComparedModel], paths: Sequence[Path], labels: LabelSet | None
) -> Comparison:
    """Embed images with two models, in turns, so that a busy machine slows both. An image counts if both can see it."""
    one, other = models
    specs = [one.encoder.spec, other.encoder.spec]
    comparison = Comparison(models)
    vectors: list[tuple[Floats, Floats]] = []
    at_once = CALL_BATCHES * max(model.encoder.batch_size for model in models)
    waiting: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []

    def embed() -> None:
        first, second = (np.stack(pixels) for pixels in zip(*waiting, strict=True))
        waiting.clear()
        if len(vectors) % 2:
            late = other.embed(second)
            vectors.append((one.embed(first), late))
        else:
            vectors.append((one.embed(first), other.embed(second)))

    streams = [decode_files(paths, spec) for spec in (specs if specs[0] != specs[1] else specs[:1])]
    for path, *seen in zip(paths, *streams, strict=True):
        refused = next((image for image in seen if isinstance(image, ImageRejected)), None)
        if refused is not None:
            comparison.rejected.append((show(str(path)), refused.reason, refused.detail))
            continue
        pixels = [image.pixels for image in seen if isinstance(image, Decoded)]
        waiting.append((pixels[0], pixels[-1]))
        if len(waiting) == at_once:
            embed()
    if waiting:
        embed()
    if not vectors:
        return comparison
    ours, theirs = (np.concatenate(parts) for parts in zip(*vectors, strict=True))
    comparison.images = len(ours)
    if one.pinned.identity == other.pinned.identity:
        comparison.cosines = measure_cosines(ours, theirs)
    if labels is not None and one.head is not None and other.head is not None:
        scores = one.head.scores(ours), other.head.scores(theirs)
        apart = np.abs(scores[0] - scores[1])
        comparison.agreeing = int((scores[0].argmax(axis=1) == scores[1].argmax(axis=1)).sum())
        comparison.relabelled = count_relabelled((ours, one.head), (theirs, other.head), labels)
        comparison.differences = float(apart.max()), float(apart.mean(dtype=np.float64))
    return comparison


def decode_files(paths: Sequence[Path], spec: ImageSpec) -> Iterator[Decoded | ImageRejected]:
    """Decode files as a job does, in child processes, which a damaged file cannot harm. One result for each path."""
    limits = Limits()
    ahead: deque[ImageRejected | None] = deque()  # None: a decoder has it
    with closing(DecoderRing(spec, limits, "auto")) as ring:
        ring.resize(count_cores())
        for path in paths:
            try:
                size = path.stat().st_size
                if size > limits.max_bytes:  # not even read
                    detail = f"{size} bytes, over {limits.max_bytes}"
                    ahead.append(ImageRejected("too_many_bytes", detail))
                else:
                    ring.submit(path.read_bytes())
                    ahead.append(None)
            except OSError as error:
                ahead.append(ImageRejected("unreadable", error.strerror or str(error)))
            if len(ahead) >= 4 * count_cores():
                yield ahead.popleft() or ring.take()
        while ahead:
            yield ahead.popleft() or ring.take()
