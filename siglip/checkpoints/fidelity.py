"""What a dtype costs: embeddings and labels of given images beside those of the dtype that `auto` chooses.

Importing this module does not import torch: the driver of a job may be a process without memory for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from siglip.checkpoint import PinnedModel
from siglip.checkpoints.files import CheckpointError
from siglip.heads import LinearHead, tag_embeddings
from siglip.labels import LabelSet
from siglip.scoring import Floats, format_cosine


@dataclass(frozen=True)
class Fidelity:
    """How near the embeddings of `images` images in `dtype` are to those in the dtype `reference`.

    The cosines are those of an image's two embeddings, not rounded: a bound is compared with them. `relabelled` images
    get other labels from the run's label set.
    """

    dtype: str
    reference: str
    images: int
    min_cosine: float
    mean_cosine: float
    relabelled: int

    def describe(self) -> str:
        """The figures in one line."""
        lowest, mean = format_cosine(self.min_cosine), format_cosine(self.mean_cosine)
        return (
            f"{self.dtype} beside {self.reference}, for {self.images} images: cosine {lowest} at least, {mean} on "
            f"average; {self.relabelled} with other labels"
        )

    def check(self, least: float) -> None:
        """Raise `CheckpointError` if a cosine is below `least`."""
        if not self.min_cosine >= least:
            raise CheckpointError(
                f"model.dtype: {self.describe()}, and model.min_cosine is {least:.12g}: use model.dtype: auto with a "
                "new output, or delete this one if no image is committed there yet"
            )


def measure_cosines(found: Floats, expected: Floats) -> Floats:
    """The cosine of each row with the same row of the other array, both (N, D) of unit norm: float32 (N,)."""
    return np.asarray((found * expected).sum(axis=1), np.float32)


def count_relabelled(one: tuple[Floats, LinearHead], other: tuple[Floats, LinearHead], labels: LabelSet) -> int:
    """Number of images that get other labels from the one model than from the other: (N, D) and the head of each."""
    ours, theirs = (tag_embeddings(vectors, labels, head).rows() for vectors, head in (one, other))
    return sum(set(first) != set(second) for (first, _), (second, _) in zip(ours, theirs, strict=True))


def measure_fidelity(pinned: PinnedModel, pixels: NDArray[np.uint8], labels: LabelSet, head: LinearHead) -> Fidelity:
    """Embed images in the model's dtype and in the one that `auto` chooses, one model after the other.

    `pixels` is uint8 (N, *spec.shape), and N at least 1. Neither model is compiled: the graphs compute the same
    numbers to within the rounding of bfloat16, and compiling takes longer than this. Raises `CheckpointError`.
    """
    from siglip.encoder import Encoder

    vectors, names = [], []
    for dtype in (pinned.config.dtype, "auto"):
        config = pinned.config.model_copy(update={"dtype": dtype, "compile": False})
        encoder = Encoder(replace(pinned, config=config), texts=False)
        vectors.append(encoder.embed_images(pixels))
        names.append(str(encoder.dtype).removeprefix("torch."))
        del encoder
    found, expected = vectors
    cosines = measure_cosines(found, expected)
    return Fidelity(
        names[0],
        names[1],
        len(pixels),
        float(cosines.min()),
        float(cosines.mean(dtype=np.float64)),
        count_relabelled((found, head), (expected, head), labels),
    )
