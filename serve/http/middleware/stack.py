"""The middlewares in their order."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.admission.auth import KeyRing
from serve.http.errors import ApiError
from serve.http.middleware.admission import AdmissionMiddleware
from serve.http.middleware.authentication import AuthenticationMiddleware
from serve.http.middleware.body import BodyMiddleware
from serve.http.middleware.error_envelope import ErrorMiddleware
from serve.http.middleware.head import HeadMiddleware
from serve.http.middleware.rate_limit import RateLimitMiddleware
from serve.http.middleware.request_context import RequestContextMiddleware
from serve.http.middleware.request_log import RequestLogMiddleware
from serve.http.middleware.response_headers import ResponseHeadersMiddleware
from serve.http.paths import is_read
from serve.service import Service


class MiddlewareStack:
    """Wraps the routes in all middlewares; each of them sees HTTP requests only. WebSockets are refused.

    A request passes them in this order, and its response in the reverse order:

    1. `RequestContextMiddleware` makes the request's context and id.
    2. `RequestLogMiddleware` writes metrics and a log line at the end.
    3. `ResponseHeadersMiddleware` adds the headers that every response has.
    4. `ErrorMiddleware` turns every exception of the layers below into the error envelope.
    5. `AuthenticationMiddleware` checks the API key, or that the client is on this machine.
    6. `RateLimitMiddleware` limits each key's requests a minute.
    7. `AdmissionMiddleware` reserves capacity and applies the deadline.
    8. `BodyMiddleware` reads the whole body, so that a slow client never occupies a route.
    9. `HeadMiddleware` answers HEAD as GET without a body.

    GET and HEAD requests skip 6 to 8, others skip 9: GET and HEAD have no body and never use the model.
    """

    def __init__(self, app: ASGIApp, service: Service, keys: KeyRing | None, behind_haproxy: bool) -> None:
        self._app = app
        limits = service.config.limits
        with_body: ASGIApp = BodyMiddleware(app, limits, service.admission)
        with_body = AdmissionMiddleware(with_body, limits, service.admission, has_keys=keys is not None)
        with_body = RateLimitMiddleware(with_body, service.config.auth.requests_per_minute)

        without_body = HeadMiddleware(app)

        async def choose(scope: Scope, receive: Receive, send: Send) -> None:
            await (without_body if is_read(scope["method"]) else with_body)(scope, receive, send)

        stack: ASGIApp = AuthenticationMiddleware(choose, keys, behind_haproxy)
        stack = ErrorMiddleware(stack, service.admission, service.settle)
        stack = ResponseHeadersMiddleware(stack, service)
        stack = RequestLogMiddleware(stack, service.metrics)
        self._stack: ASGIApp = RequestContextMiddleware(stack, service.worker)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await self._stack(scope, receive, send)
            case "websocket":
                await _refuse_websocket(scope, send)
            case _:
                await self._app(scope, receive, send)


async def _refuse_websocket(scope: Scope, send: Send) -> None:
    """Refuse a WebSocket's handshake in the error envelope, or close it if the server cannot send a body."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close"})
        return
    error = ApiError("not_found", "this server has no WebSockets: send an HTTP request")
    for message in error.messages():
        await send({**message, "type": f"websocket.{message['type']}"})
