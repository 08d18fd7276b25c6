"""HEAD requests: the response to the same GET, without its body."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadMiddleware:
    """Lets a route answer HEAD wherever it answers GET (RFC 9110), with the same status and headers.

    FastAPI's routes answer GET only. Adding HEAD to each of them would add it to the API reference too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        # A copy: the HTTP server reads the method of the original, and sends no body because of it.
        as_get = {**scope, "method": "GET"}
        try:
            await self._app(as_get, receive, send_without_body)
        finally:
            scope.update({key: as_get[key] for key in ("route", "path_params") if key in as_get})
