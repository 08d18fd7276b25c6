"""Headers that every response has."""

from __future__ import annotations

import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.context import RequestContext
from serve.http.middleware.request_context import get_context
from serve.service import Service

TRUNCATED = "x-sightline-truncated"
"""The number of texts and prompts that are longer than the model's input. Responses without such texts do not have it.
"""


class ResponseHeadersMiddleware:
    """Adds Server-Timing, the fingerprint of model and label set, the number of cut texts, and a key's rate limits."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = get_context(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add(MutableHeaders(scope=message), context)
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _add(self, headers: MutableHeaders, context: RequestContext) -> None:
        stages = {**context.stages, "total": time.monotonic() - context.started}
        headers["server-timing"] = ", ".join(f"{name};dur={value * 1000:.2f}" for name, value in stages.items())
        about = getattr(self._service, "about", None)  # not there before the service has started
        if about is not None:
            headers["x-sightline-model"] = about.weights
        if context.labels_digest is not None:
            headers["x-sightline-labels"] = context.labels_digest
        if context.truncated:
            headers[TRUNCATED] = str(context.truncated)
        for unit, quota in context.quotas.items():
            for name, value in quota.headers(unit).items():
                headers[name] = value
