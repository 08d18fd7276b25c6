"""The model as the rest of the endpoint knows it: what it is asked, and what it answers.

No torch here: an ingress imports this, and would carry hundreds of megabytes for a few small classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from siglip.config import ImageSpec
from siglip.scoring import Floats, Scale


class ModelStuck(Exception):
    """The model does not answer."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings (N, D) of unit norm by the model `weights`, a digest, and the seconds that they waited for a batch and
    were computed for."""

    vectors: Floats
    weights: str
    waited: float
    ran: float
    batch: int


@dataclass(frozen=True)
class ModelAbout:
    """What an ingress must know of the model to serve it.

    `config` is the digest of the settings that it was started with (`serve.config.EndpointConfig.model_digest`), by
    which an ingress knows its own among replicas that are just being replaced. `weights` is that of the checkpoint.
    `text_batch` are the texts of one forward pass, `family` is a key of `siglip.families.FAMILIES`.
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
    weights: str
    family: str
    loaded: int


class Model(Protocol):
    """`serve.rayserve.replica.ModelServer`, here or behind a handle."""

    async def describe(self) -> ModelAbout:
        """What runs there."""

    async def check_ready(self) -> None:
        """Raises `ModelStuck` or `ApiError` when the model does not answer."""

    async def embed_images(self, pixels: NDArray[np.uint8], seconds: float) -> Embedded:
        """uint8 (N, S, S, 3) to embeddings, within `seconds`."""

    async def embed_texts(self, texts: Sequence[str], seconds: float) -> Embedded:
        """Texts to embeddings, within `seconds`."""
