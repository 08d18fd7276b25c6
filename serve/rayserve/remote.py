"""The model behind a Ray Serve handle. Ray's errors become the endpoint's errors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve.admission.batcher import Expired
from serve.http.errors import ApiError
from serve.model import Embedded, ModelAbout
from serve.rayserve.internals import pass_by_reference, pass_by_value

RETRY_AFTER = 2.0
"""Seconds after which a client should repeat a request that a dead replica held. By then another replica takes the
request, or a new one is starting."""

LARGE_BYTES = 2**20
"""Size of a pixel array from which it goes through Ray's object store instead of inside the call.

For a few images of 196 kB, the object store's bookkeeping costs more than copying them. More images arrive sooner
through the object store, because a replica on the same node reads them in shared memory: 16 images take a third of the
time, and the ingress and the replica each save that much of a core. Ray Serve refuses a call that holds 4 MiB."""


class RemoteModel:
    """Client of a `serve.rayserve.replica.ModelServer` in another process of the cluster.

    Arguments and results travel inside the call, except arrays of `LARGE_BYTES` and more.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = pass_by_value(handle)
        self._stored = pass_by_reference(handle)

    async def describe(self) -> ModelAbout:
        """Return the description of the replica's model."""
        about: ModelAbout = await self._call(self._handle.describe.remote())
        return about

    async def check_ready(self) -> None:
        """Raise `ApiError` if the model does not respond."""
        await self._call(self._handle.check_ready.remote())

    async def embed_images(self, pixels: np.ndarray, seconds: float) -> Embedded:
        """See `serve.rayserve.replica.ModelServer.embed_images`. Raises `ApiError`, `Expired`."""
        handle = self._handle if pixels.nbytes < LARGE_BYTES else self._stored
        embedded: Embedded = await self._call(handle.embed_images.remote(pixels, seconds))
        return embedded

    async def embed_texts(self, texts: Sequence[str], seconds: float) -> Embedded:
        """See `serve.rayserve.replica.ModelServer.embed_texts`. Raises `ApiError`, `Expired`."""
        embedded: Embedded = await self._call(self._handle.embed_texts.remote(list(texts), seconds))
        return embedded

    async def _call(self, response: Any) -> Any:
        """Return the result of a call. Cancelling this coroutine cancels the call, so the replica drops its items."""
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Ray Serve cancelled the call; this task was not cancelled.
            raise ApiError(
                "unavailable", "the model's call was cancelled: try again", retry_after=RETRY_AFTER
            ) from None
        except BackPressureError:
            raise ApiError("overloaded", "the model's queue is full: try again later", retry_after=1.0) from None
        except RayTaskError as error:
            if isinstance(error.cause, Expired):
                raise Expired from None
            raise  # the model itself failed, and the error says how
        except (RayError, RayServeException) as error:
            # The replica's process or node is gone, or never started.
            raise ApiError(
                "unavailable", "the replica that held this request is gone: try again", retry_after=RETRY_AFTER
            ) from error
