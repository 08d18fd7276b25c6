"""Middleware for Ray Serve's own HTTP proxy: its refusals get the endpoint's error envelope.

When the proxy's queue is full, or a process behind it dies, the proxy responds itself, in plain text, or not at all.
Ray Serve adds this middleware when the environment variable `serve.rayserve.internals.PROXY_CALLBACK` is
`CALLBACK_PATH`.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.errors import ApiError
from serve.rayserve.request_headers import RequestHeaders

CALLBACK_PATH = "serve.rayserve.proxy:middlewares"
OWN_PATHS = "/-/"
"""Prefix of Ray Serve's own paths: its health check and its list of routes."""
MARK = b"server-timing"
"""A header that `serve.http.middleware` sets in every response, and the proxy in none."""


def middlewares() -> list[Middleware]:
    """Return the middleware of a proxy. Ray Serve calls this when it starts the proxy."""
    return [Middleware(RequestHeaders), Middleware(Envelope)]  # the last one is the outermost


class Envelope:
    """ASGI middleware that replaces error responses which the application did not write."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(OWN_PATHS):
            await self.app(scope, receive, send)
            return
        started = replaced = False

        async def forward(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                started = True
                headers = dict(message["headers"])
                if message["status"] >= 400 and MARK not in headers:
                    replaced = True
                    await _send_error(send, translate(message["status"], headers.get(b"retry-after")))
            if not replaced:
                await send(message)

        await self.app(scope, receive, forward)
        if not started:  # the ingress died while it held the request
            await _send_error(send, translate(503, None))


def translate(status: int, retry_after: bytes | None) -> ApiError:
    """Return the endpoint's error for a proxy's refusal. `retry_after` is the proxy's Retry-After header."""
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
