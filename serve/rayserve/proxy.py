"""Ray Serve's own refusals in the endpoint's envelope.

When its queue is full, or a process behind it dies, Ray Serve's HTTP proxy answers by itself, in plain text or not at
all. Proxies started with RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.rayserve.proxy:middlewares answer as the
endpoint does.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.errors import ApiError

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK_PATH = "serve.rayserve.proxy:middlewares"
OWN_PATHS = "/-/"
"""Ray Serve's own pages: its health and its routes."""
MARK = b"server-timing"
"""A header that every answer of `serve.http.middleware` has, and none of the proxy's own."""


def middlewares() -> list[Middleware]:
    """What Ray Serve calls when it starts a proxy."""
    return [Middleware(Envelope)]


class Envelope:
    """Replaces answers that the application did not write."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(OWN_PATHS):
            await self.app(scope, receive, send)
            return
        started = replaced = False

        async def pass_on(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                started = True
                headers = dict(message["headers"])
                if message["status"] >= 400 and MARK not in headers:
                    replaced = True
                    await _send_error(send, translate(message["status"], headers.get(b"retry-after")))
            if not replaced:
                await send(message)

        await self.app(scope, receive, pass_on)
        if not started:  # the ingress died with the request
            await _send_error(send, translate(503, None))


def translate(status: int, retry_after: bytes | None) -> ApiError:
    """The proxy's refusal as the endpoint's."""
    if status == 404:  # no application is deployed under this path
        return ApiError("unavailable", "no endpoint is running here yet: try again", retry_after=2.0)
    if status == 429:
        seconds = float(retry_after) if retry_after and retry_after.isdigit() else 1.0
        return ApiError("overloaded", "the queue is full: try again later", retry_after=seconds)
    if status == 408:
        return ApiError("deadline_exceeded", "the answer was not ready in time: try again later", retry_after=1.0)
    return ApiError("unavailable", "the process that held this request is gone: try again", retry_after=2.0)


async def _send_error(send: Send, error: ApiError) -> None:
    for message in error.messages():
        await send(message)
