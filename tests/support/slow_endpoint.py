"""The endpoint with an artificially slow model, so that a few clients suffice to make its replicas scale up."""

# No `from __future__ import annotations` here: `serve.app` says why.

import asyncio
from typing import Any

from ray.serve import Application

import serve.app
import serve.rayserve.replica
from serve.config import EndpointConfig
from serve.model import Embedded

SECONDS = 0.5


def slow_model(seconds: float) -> type[serve.rayserve.replica.ModelServer]:
    """Return a model class that waits `seconds` in each call without using a core.

    The class is local because Ray pickles local classes by value: replicas need not import this module.
    """
    asleep, quick = asyncio.sleep, serve.rayserve.replica.ModelServer

    class SlowModel(quick):  # type: ignore[misc, valid-type]
        async def embed_images(self, pixels: Any, seconds_left: float) -> Embedded:
            await asleep(seconds)
            return await quick.embed_images(self, pixels, seconds_left)

        async def embed_texts(self, texts: Any, seconds_left: float) -> Embedded:
            await asleep(seconds)
            return await quick.embed_texts(self, texts, seconds_left)

    return SlowModel


def build(args: EndpointConfig) -> Application:
    """Build the application. A Serve configuration names this function in `import_path`."""
    quick = serve.rayserve.replica.ModelServer
    serve.rayserve.replica.ModelServer = slow_model(SECONDS)  # type: ignore[misc]
    try:
        return serve.app.build(args)
    finally:
        serve.rayserve.replica.ModelServer = quick  # type: ignore[misc]
