"""`GET /metrics` on the API's own port, for who can open one port only: what this node's Ray gives to Prometheus."""

from __future__ import annotations

import asyncio

import httpx2
from fastapi import FastAPI
from starlette.responses import Response

from serve.http.errors import ApiError
from serve.http.responses import documented

SECONDS = 5.0
MOST_BYTES = 32 * 2**20
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def add_scrape(app: FastAPI) -> None:
    """Register the route. It needs a key like the others: Prometheus sends one as `authorization`.

    The series are those of every process on the node that answers, this ingress's and its neighbours'. On a cluster
    ask each node at Ray's own port instead: which node answers here is chance.
    """
    address: str | None = None

    @app.get("/metrics", response_class=Response, responses=documented(503), tags=["health"])
    async def scrape() -> Response:
        """This node's Prometheus metrics."""
        nonlocal address
        if address is None:
            address = await asyncio.to_thread(_find_agent)
        try:
            async with (
                httpx2.AsyncClient(timeout=SECONDS, trust_env=False) as client,
                client.stream("GET", f"http://{address}/metrics") as answer,
            ):
                content = bytearray()
                async for chunk in answer.aiter_bytes():
                    content += chunk
                    if len(content) > MOST_BYTES:
                        raise ApiError("unavailable", f"this node has more than {MOST_BYTES} bytes of metrics")
        except httpx2.HTTPError:
            raise ApiError("unavailable", "Ray's metrics agent does not answer", retry_after=SECONDS) from None
        if answer.status_code != 200:
            raise ApiError("unavailable", f"Ray's metrics agent answers {answer.status_code}", retry_after=SECONDS)
        return Response(bytes(content), media_type=MEDIA_TYPE)


def _find_agent() -> str:
    """Where this node's Ray gives its metrics. Raises `ApiError` where there is no Ray."""
    import ray

    if not ray.is_initialized():
        raise ApiError("unavailable", "metrics are Ray's, and this process is not in one")
    mine = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == mine:
            return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    raise ApiError("unavailable", "Ray does not know this node")
