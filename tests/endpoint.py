"""The real application with the checkpoint that ships, on a real socket of this process: all but Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from serve.app import make_app
from serve.config import EndpointConfig
from serve.model import ModelServer

START_SECONDS = 120


class Endpoint:
    """A running endpoint. `url` ends with a slash."""

    def __init__(self, **config: Any) -> None:
        settings = EndpointConfig.model_validate({"ingress": {"decoders": 1}, "replicas": {"num_cpus": 1}, **config})
        self._server = uvicorn.Server(
            uvicorn.Config(
                make_app(settings, ModelServer(settings)),
                host="127.0.0.1",
                port=0,
                log_level="warning",
                ws="none",
                timeout_graceful_shutdown=5,
            )
        )
        self._thread = threading.Thread(target=self._server.run, name="endpoint")
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError("the endpoint did not start")
            time.sleep(0.02)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"

    def stop(self) -> None:
        """Stop it and wait until it is gone."""
        self._server.should_exit = True
        self._thread.join(START_SECONDS)


@contextmanager
def run_endpoint(**config: Any) -> Iterator[Endpoint]:
    """An endpoint with these keys of `serve.config.EndpointConfig`, for as long as the context."""
    endpoint = Endpoint(**config)
    try:
        yield endpoint
    finally:
        endpoint.stop()
