"""The interface between the ingress and the model: the `Model` protocol and what its methods return.

This module does not import torch. An ingress imports it, and torch would add hundreds of megabytes to the ingress.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from siglip.config import ImageSpec
from siglip.label_text.tokens import Reading
from siglip.scoring import Floats, Scale


class ModelStuck(Exception):
    """The model does not respond."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings of one call of the model.

    `vectors` are float32 (N, D) of unit norm. `numbers` is `ModelAbout.numbers` of the replica that made them. `waited`
    and `ran` are the seconds that the items waited for a batch and were computed, `batch` is the size of the last
    batch. `readings` are what the model read of each text, None for images.
    """

    vectors: Floats
    numbers: str
    waited: float
    ran: float
    batch: int
    readings: list[Reading] | None = None

    def list_readings(self) -> list[Reading]:
        """What the model read of each text. There must be texts."""
        assert self.readings is not None
        return self.readings


@dataclass(frozen=True)
class ModelAbout:
    """Description of a model: what an ingress must know to serve it.

    `config` is the digest of the settings that the model was started with (`serve.config.EndpointConfig.model_digest`).
    During an update, an ingress recognizes the replicas of its own model by it. `weights` is the digest of the
    checkpoint. `width` is the size of an embedding. `text_length` is the number of tokens of a text. `batch_size` and
    `text_batch` are the numbers of images and of texts in one forward pass. `family` is a key of
    `siglip.families.FAMILIES`. `min_cosine` is the lowest that the self-test's images have in this dtype with their
    embeddings in float32, None for float32. `loaded` is the Unix time in seconds at which the model was ready.
    """

    config: str

    spec: ImageSpec
    width: int
    scale: Scale
    text_length: int
    batch_size: int
    text_batch: int
    device: str
    dtype: str
    min_cosine: float | None
    weights: str
    family: str
    loaded: int

    @property
    def numbers(self) -> str:
        """What an embedding depends on: replicas with the same value may answer one request together.

        That is the checkpoint with its size of images, the rule for texts, and int8. float32 and bfloat16 are not told
        apart: which of them `auto` is depends on the machine of each replica.
        """
        return f"{self.weights} {self.family}{' int8' if self.dtype == 'int8' else ''}"


class Model(Protocol):
    """A `serve.rayserve.replica.ModelServer`, in this process or behind a Ray Serve handle."""

    async def describe(self) -> ModelAbout:
        """Return the model's description."""

    async def check_ready(self) -> None:
        """Raise `ModelStuck` or `ApiError` if the model does not respond."""

    async def embed_images(self, pixels: NDArray[np.uint8], seconds: float) -> Embedded:
        """Embed preprocessed images, uint8 (N, *spec.shape), within `seconds`."""

    async def embed_texts(self, texts: Sequence[str], seconds: float) -> Embedded:
        """Embed texts within `seconds`."""
