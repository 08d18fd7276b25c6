"""Calls of the model's replicas from an ingress, with retries while the endpoint changes its model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from serve.admission.batcher import Expired
from serve.http.errors import RETRY_AFTER, ApiError
from serve.label_sets.prompts import EmbeddedPrompts
from serve.log import log
from serve.model import Embedded, Model, ModelAbout

OTHER_MODEL_SECONDS, OTHER_MODEL_PATIENCE = 0.25, 0.5
"""When a replica of another model responded: seconds between two tries, and seconds for which a request is retried."""
START_SECONDS = 3600.0
"""Time limit for the model to start: a node may have to be started first, and weights to be downloaded."""


async def wait_for_model(model: Model, config_digest: str) -> ModelAbout:
    """Return the description of the model once a replica with this configuration responds.

    While a changed configuration is rolled out, replicas of the previous configuration respond too. Raises
    `TimeoutError` after `START_SECONDS`.
    """
    async with asyncio.timeout(START_SECONDS):
        while (about := await model.describe()).config != config_digest:
            await asyncio.sleep(OTHER_MODEL_SECONDS)
    return about


class ModelClient:
    """Calls the model and raises `ApiError` for every failure that a client may retry.

    It accepts only embeddings with the `numbers` of `about`. It does not batch (see `Embedder`).
    """

    def __init__(self, model: Model, about: ModelAbout) -> None:
        self._model = model
        self.about = about

    async def embed_images(self, pixels: NDArray[np.uint8], seconds: float) -> Embedded:
        """Embed preprocessed images, uint8 (N, *spec.shape), within `seconds`. Raises `ApiError` and `Expired`."""
        return await self._call(partial(self._model.embed_images, pixels, seconds), OTHER_MODEL_PATIENCE)

    async def embed_texts(self, texts: Sequence[str], seconds: float) -> Embedded:
        """Embed texts within `seconds`. Raises `ApiError` and `Expired`."""
        return await self._call(partial(self._model.embed_texts, texts, seconds), OTHER_MODEL_PATIENCE)

    async def embed_registered(self, prompts: Sequence[str]) -> EmbeddedPrompts:
        """Embed a registered label set's prompts, without a request's deadline.

        Prompts are cut into the encoder's own text batches, so that the numbers are the same as the batch job's.
        Raises `ApiError` and `Expired`.
        """
        size = self.about.text_batch
        pieces = [
            await self._call(
                partial(self._model.embed_texts, prompts[start : start + size], START_SECONDS), START_SECONDS
            )
            for start in range(0, len(prompts), size)
        ]
        readings = [reading for embedded in pieces for reading in embedded.list_readings()]
        return EmbeddedPrompts(np.concatenate([embedded.vectors for embedded in pieces]), readings)

    async def _call(self, embed: Callable[[], Awaitable[Embedded]], patience: float) -> Embedded:
        """Repeat a call for up to `patience` seconds until a replica with this ingress's numbers responds.

        During a change of configuration, replicas of the previous or the next configuration respond too. Their
        embeddings must not be compared with this model's label embeddings, nor scored with this model's scale; and a
        text that they read by another rule must not be cached.
        """
        until = time.monotonic() + patience
        while (embedded := await _try(embed)).numbers != self.about.numbers:
            if time.monotonic() >= until:
                log.warning("a replica has the model %s, expected %s", embedded.numbers, self.about.numbers)
                raise ApiError("unavailable", "the endpoint is changing its model: try again", retry_after=RETRY_AFTER)
            await asyncio.sleep(OTHER_MODEL_SECONDS)
        return embedded


async def _try(embed: Callable[[], Awaitable[Embedded]]) -> Embedded:
    """One call. An unexpected exception becomes `unavailable`: the client may retry, and the health check restarts a
    replica that keeps failing."""
    try:
        return await embed()
    except (ApiError, Expired):
        raise
    except Exception as error:
        log.exception("the model failed")
        raise ApiError("unavailable", "the model failed on this request", retry_after=RETRY_AFTER) from error
