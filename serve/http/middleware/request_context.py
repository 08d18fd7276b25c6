"""The request's context and its id."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.admission.load import Permit
from serve.context import RequestContext
from serve.worker import WorkerThread

REQUEST_ID = "x-request-id"
_VALID_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestContextMiddleware:
    """Puts a new `RequestContext` into the request's state, and records the response's status in it.

    The request's id is the client's X-Request-ID if it is up to 128 visible ASCII characters, or else a new one, which
    the response then has as a header. An id that came with the request is not added to the response: Ray Serve's proxy,
    which gives requests their ids, adds it.
    """

    def __init__(self, app: ASGIApp, worker: WorkerThread) -> None:
        self._app = app
        self._worker = worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get(REQUEST_ID, "")
        has_id = is_valid_id(given)
        context = RequestContext(given if has_id else uuid.uuid4().hex, Permit(0.0), self._worker)
        scope.setdefault("state", {})["context"] = context

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                if not has_id:
                    MutableHeaders(scope=message)[REQUEST_ID] = context.request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def is_valid_id(text: str) -> bool:
    """Whether a client's X-Request-ID is used as the request's id: up to 128 visible ASCII characters."""
    return _VALID_ID.fullmatch(text) is not None


def get_context(scope: Scope) -> RequestContext:
    """The context that `RequestContextMiddleware` put into a request's ASGI scope."""
    context: RequestContext = scope["state"]["context"]
    return context
