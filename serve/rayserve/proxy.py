"""Middleware for Ray Serve's own HTTP proxy: its refusals get the endpoint's error envelope.

When the proxy's queue is full, or a process behind it dies, the proxy responds itself, in plain text, or not at all.
Ray Serve adds this middleware when the environment variable `serve.rayserve.internals.PROXY_CALLBACK` is
`CALLBACK_PATH`.
"""

from __future__ import annotations

from http import HTTPStatus

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.errors import ApiError
from serve.rayserve.request_headers import RequestHeaders

CALLBACK_PATH = "serve.rayserve.proxy:middlewares"
OWN_PATHS = "/-/"
"""Prefix of Ray Serve's own paths: its health check and its list of routes."""
MARK = b"server-timing"
"""A header that the application sets in every response, and the proxy in none."""


def middlewares() -> list[Middleware]:
    """Return the middleware of a proxy. Ray Serve calls this when it starts the proxy."""
    return [Middleware(RequestHeaders), Middleware(Envelope)]  # the last one is the outermost


class Envelope:
    """ASGI middleware that replaces error responses which the application did not write.

    A response of the application, which has the header `MARK`, passes unchanged. uvicorn's own 400 for bytes that are
    not HTTP is plain text: it never gets here.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(OWN_PATHS):
            await self.app(scope, receive, send)
            return
        if not scope["path"].startswith("/"):  # OPTIONS * is about the server; Ray Serve's 404 would mean "not yet"
            await _send_error(send, ApiError("not_found", "send a path that begins with /"))
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
    """Return the endpoint's error for a proxy's refusal. `retry_after` is the proxy's Retry-After header.

    The error has the proxy's status, with three exceptions, which clients repeat by themselves: 404 means that no
    application is deployed yet, 408 that the ingress took too long, and 502 and 504 that it is gone.
    """
    match status:
        case 404:
            return ApiError("unavailable", "no endpoint is running here yet: try again", retry_after=2.0)
        case 405:
            return ApiError("method_not_allowed", "the endpoint has no such method: send GET, HEAD, POST or OPTIONS")
        case 408:
            return ApiError("deadline_exceeded", "the answer was not ready in time: try again later", retry_after=1.0)
        case 413:
            return ApiError("body_too_large", "the proxy refused the body because of its size: send a smaller one")
        case 429:
            seconds = float(retry_after) if retry_after and retry_after.isdigit() else 1.0
            return ApiError("overloaded", "the queue is full: try again later", retry_after=seconds)
        case 500:
            return ApiError("internal_error", "the proxy failed: its log has the reason")
        case 502 | 503 | 504:
            return ApiError("unavailable", "the process that held this request is gone: try again", retry_after=2.0)
    reason = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else f"status {status}"
    code = "invalid_request" if status < 500 else "unavailable"
    return ApiError(code, f"the proxy refused the request: {reason}", status=status)


async def _send_error(send: Send, error: ApiError) -> None:
    for message in error.messages():
        await send(message)
