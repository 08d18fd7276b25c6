"""Request headers that Ray Serve itself reads, checked before it does.

Ray Serve returns a request's X-Request-ID in the response as it came, of any length, and writes it into its logs. It
decodes a few other headers as UTF-8, and fails with status 500 if they are not.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.http.middleware.request_context import REQUEST_ID, is_valid_id

READ_BY_US = (b"host", b"authorization", b"x-api-key", b"content-type", b"content-encoding")
"""Headers that the endpoint itself reads, and refuses if they are wrong."""


class RequestHeaders:
    """ASGI middleware that removes an X-Request-ID that is not valid, and headers that are not UTF-8.

    Ray Serve gives a request without an id a new one. Headers that the endpoint reads itself are kept as they are.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            scope["headers"] = [(name, value) for name, value in scope["headers"] if _is_kept(name.lower(), value)]
        await self.app(scope, receive, send)


def _is_kept(name: bytes, value: bytes) -> bool:
    if name == REQUEST_ID.encode():
        return is_valid_id(value.decode("latin-1"))
    if name in READ_BY_US:
        return True
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
