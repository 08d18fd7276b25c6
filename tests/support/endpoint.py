"""The endpoint without Ray: the real application and model behind a real HTTP server on loopback."""

from __future__ import annotations

import base64
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from serve.config import EndpointConfig
from serve.http.app import make_app
from serve.rayserve.replica import ModelServer
from serve.service import Service
from sightline.demo.shapes import render
from storage.settings import read_settings
from tests.support.images import encode

EXAMPLE = Path(__file__).parents[2] / "configs" / "endpoint.yaml"


def make_config(**changes: Any) -> EndpointConfig:
    """Return `configs/endpoint.yaml` with some keys changed.

    The model computes in float32, so that batches of any size give the same numbers.
    """
    raw = read_settings(EXAMPLE, "", EndpointConfig)
    raw["model"] = {"source": "tiny", "dtype": "float32", "batch_size": 16}
    raw["ingress"] = {"decoders": 1}
    return EndpointConfig.model_validate({**raw, **changes})


class Endpoint:
    """A running endpoint: its URL, an HTTP client for it, and its service and model, which tests inspect."""

    def __init__(self, url: str, client: httpx.Client, service: Service, model: ModelServer) -> None:
        self.url = url
        self.client = client
        self.service = service
        self.model = model

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Send a POST request with a JSON body."""
        return self.client.post(path, json=body, **options)


@contextmanager
def run_endpoint(
    config: EndpointConfig, model: ModelServer | None = None, behind_haproxy: bool = False
) -> Iterator[Endpoint]:
    """Serve on a free port of loopback until the `with` block ends."""
    model = model or ModelServer(config)
    app = make_app(config, model, behind_haproxy)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the endpoint did not start")
        thread.join(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Endpoint(url, client, app.state.service, model)
    finally:
        server.should_exit = True
        thread.join(30)
        server.force_exit = True  # a stalled client must not keep the port after its test
        thread.join(30)


def shape_png(label: str = "red circle", seed: int = 1) -> bytes:
    """Return a PNG of a coloured shape. The shipped checkpoint recognizes these shapes."""
    return encode(render(label, random.Random(seed), (96, 64)))


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """An image as a data: URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
