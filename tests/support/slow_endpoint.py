"""The endpoint with a model that takes its time: what makes one grow, on a machine whose model is quick."""

# No postponed annotations: see `serve.app`.

import asyncio
from typing import Any

from ray.serve import Application

import serve.app
import serve.rayserve.replica
from serve.config import EndpointConfig
from serve.model import Embedded

SECONDS = 0.5


def slow_model(seconds: float) -> type[serve.rayserve.replica.ModelServer]:
    """A model that takes so long for each call, and no cores for it. Ray pickles a local class by value."""
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
    """For a Serve config's `import_path`."""
    quick = serve.rayserve.replica.ModelServer
    serve.rayserve.replica.ModelServer = slow_model(SECONDS)  # type: ignore[misc]
    try:
        return serve.app.build(args)
    finally:
        serve.rayserve.replica.ModelServer = quick  # type: ignore[misc]
