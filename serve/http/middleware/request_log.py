"""Metrics and the log line of a request."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.context import RequestContext
from serve.http.middleware.request_context import get_context
from serve.http.paths import HEALTH_PATHS
from serve.log import log
from serve.rayserve.metrics import IngressMetrics


class RequestLogMiddleware:
    """Counts each request in the metrics and logs it when it is over. Successful health checks are not logged."""

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
            scope["method"],
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
