"""Metrics and the log line of a request."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.context import RequestContext
from serve.http.middleware.request_context import get_context
from serve.http.paths import HEALTH_PATHS
from serve.http.quoting import shorten
from serve.log import log
from serve.rayserve.metrics import IngressMetrics

METHOD_CHARACTERS = 16
"""Longest method in a log line. A client may send any word as the method."""


class RequestLogMiddleware:
    """Counts each request in the metrics and logs it when it is over. Successful health checks are not logged.

    Both have the route's path as the code has it, never the request's own path: metrics would have a series for each.
    """

    def __init__(self, app: ASGIApp, metrics: IngressMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = get_context(scope)
        try:
            await self._app(scope, receive, send)
        finally:
            self._record(scope, context)

    def _record(self, scope: Scope, context: RequestContext) -> None:
        seconds = time.monotonic() - context.started
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.record_request(route, context.status, context.code, seconds)
        self._metrics.record_stages(context.stages)
        if scope["path"] in HEALTH_PATHS and context.status == 200:
            return
        log.info(
            "%s %s %d",
            shorten(scope["method"], METHOD_CHARACTERS),
            route,
            context.status,
            extra={
                "request_id": context.request_id,
                "key": context.key,
                "code": context.code,
                "ms": round(seconds * 1000, 2),
                "images": context.images,
                "texts": context.texts,
                "bytes": context.permit.load.bytes,
                "stages_ms": {stage: round(value * 1000, 2) for stage, value in context.stages.items()},
            },
        )
