"""`GET /metrics` on the API's own port: the metrics that this node's Ray exports for Prometheus.

It is for clusters where only one port can be opened. It is off by default: see `metrics_route` in the configuration.
"""

from __future__ import annotations

import asyncio

import httpx2
from fastapi import FastAPI
from starlette.responses import Response

from serve.http.errors import ApiError
from serve.http.responses import documented
from serve.service import Service

SECONDS = 5.0
"""Time limit for Ray's metrics agent to respond."""
MAX_BYTES = 32 * 2**20
"""Limit of the metrics of one node."""
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def add_metrics_route(app: FastAPI, service: Service) -> None:
    """Register the route, if the configuration has `metrics_route`. It needs an API key as the other routes do:
    Prometheus sends one as `authorization`.

    The response has the series of all processes on the node that responds, not only of this ingress. In a cluster with
    several nodes, scrape each node at Ray's own port instead: here the proxy chooses the node.
    """
    if not service.config.metrics_route:
        return
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
                client.stream("GET", f"http://{address}/metrics") as response,
            ):
                content = bytearray()
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_BYTES:
                        raise ApiError("unavailable", f"this node has more than {MAX_BYTES} bytes of metrics")
        except httpx2.HTTPError:
            raise ApiError("unavailable", "Ray's metrics agent does not respond", retry_after=SECONDS) from None
        if response.status_code != 200:
            message = f"Ray's metrics agent responded with status {response.status_code}"
            raise ApiError("unavailable", message, retry_after=SECONDS)
        return Response(bytes(content), media_type=MEDIA_TYPE)


def _find_agent() -> str:
    """Host and port of this node's metrics agent of Ray. Raises `ApiError` if this process does not run in Ray."""
    import ray

    if not ray.is_initialized():
        raise ApiError("unavailable", "Ray exports the metrics, and this process does not run in Ray")
    node_id = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == node_id:
            return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    raise ApiError("unavailable", "Ray does not know this node")
