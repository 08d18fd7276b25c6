"""The model behind a Ray Serve handle, with Ray's errors as the endpoint's."""

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

RETRY_AFTER = 2.0
"""Seconds after which a request that a dead replica held may come again: others take it, or a new one is starting."""


LARGE_BYTES = 2**20
"""From here on pixels go through the object store. Its bookkeeping costs more than copying a few images of 196 kB does;
but more of them are there sooner, since a replica on the same node reads them where they are: 16 take a third of the
time, and a core of either process is spared as much. A call with 4 MiB in it Ray Serve would refuse."""


class RemoteModel:
    """`serve.rayserve.replica.ModelServer` somewhere else in the cluster.

    Arguments and results travel in the call itself, but for many images together: see `LARGE_BYTES`.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle.options(_by_reference=False)
        self._stored = handle.options(_by_reference=True)

    async def describe(self) -> ModelAbout:
        """What runs there."""
        about: ModelAbout = await self._call(self._handle.describe.remote())
        return about

    async def check_ready(self) -> None:
        """Raises `ApiError` when the model does not answer."""
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
        """The result of a call. A caller that is cancelled cancels it, so that it is dropped before the model."""
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Ray Serve cancelled the call, and not somebody its caller.
            raise ApiError(
                "unavailable", "the model's call was cancelled: try again", retry_after=RETRY_AFTER
            ) from None
        except BackPressureError:
            raise ApiError("overloaded", "the model's queue is full: try again later", retry_after=1.0) from None
        except RayTaskError as error:
            if isinstance(error.cause, Expired):
                raise Expired from None
            raise  # the model's own failure, in its own words
        except (RayError, RayServeException) as error:
            # Its process or its node is gone, or never came.
            raise ApiError(
                "unavailable", "the replica that held this request is gone: try again", retry_after=RETRY_AFTER
            ) from error
