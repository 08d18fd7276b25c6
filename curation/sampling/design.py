"""The design of a sample: the strata from which its questions were drawn.

A stratum is a range of scores of one label. The images that were drawn from it are a simple random sample of its
images, so that an estimate about the whole output needs to know, for each answer, the stratum and the number of its
images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from siglip.heads import LinearHead
from siglip.scoring import Floats


@dataclass(frozen=True)
class Design:
    """The strata of one sample.

    `edges` holds, for each label by name, the borders between its strata: increasing float32 scores of `head`. An image
    is in stratum i if its score reaches i of them. `names` are the labels of `head`, in its order. `images` is the
    number of images of the output from which the sample was drawn, and `weights` the digest of the model that it was
    tagged with.

    A design without a head has one stratum: its images were drawn from all images, without regard to scores.
    """

    sample: str
    images: int
    edges: Mapping[str, Floats]
    names: tuple[str, ...] = ()
    head: LinearHead | None = None
    weights: str = ""

    def count_strata(self, label: str) -> int:
        """The number of strata of a label."""
        return len(self.edges.get(label, ())) + 1

    def assign_strata(self, label: str, scores: Floats) -> NDArray[np.int64]:
        """The stratum of each image, int64 (N,), from the scores (N,) of the design's head for this label."""
        edges = self.edges.get(label)
        if edges is None or not len(edges):
            return np.zeros(len(scores), np.int64)
        return np.searchsorted(edges, scores, side="right").astype(np.int64)
