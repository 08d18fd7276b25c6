"""Exceptions to OpenAI's error envelope."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.admission.batcher import Expired
from serve.admission.controller import AdmissionController
from serve.context import RequestContext
from serve.http.errors import RETRY_AFTER, ApiError
from serve.http.middleware.request_context import get_context
from serve.log import log

CLIENT_GONE = 499
"""nginx's status for a client that closed the connection before the response: for the log and the metrics only."""


class ClientGone(Exception):
    """The client closed the connection before its body was complete."""


class ErrorMiddleware:
    """Sends the error envelope for every exception of the layers below, unless a response has begun.

    An exception that is no `ApiError` is logged with its traceback; the client gets `internal_error` and the request's
    id, and nothing of the exception. `settle` is called for refused requests, before the error is sent.
    """

    def __init__(self, app: ASGIApp, admission: AdmissionController, settle: Callable[[RequestContext], None]) -> None:
        self._app = app
        self._admission = admission
        self._settle = settle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = get_context(scope)
        try:
            await self._app(scope, receive, send)
        except ApiError as error:
            self._settle(context)
            await _send_error(error, context, send)
        except Expired:
            self._settle(context)
            await _send_error(deadline_error(context, self._admission), context, send)
        except ClientGone:
            context.status = CLIENT_GONE
        except asyncio.CancelledError:
            context.status = CLIENT_GONE
            raise
        except MemoryError:
            log.exception("too little memory", extra={"request_id": context.request_id})
            hidden = ApiError("unavailable", "the server has too little memory now: try again", retry_after=RETRY_AFTER)
            await _send_error(hidden, context, send)
        except Exception:
            log.exception("internal error", extra={"request_id": context.request_id})
            hidden = ApiError("internal_error", f"internal error; its request id is {context.request_id}")
            await _send_error(hidden, context, send)


def deadline_error(context: RequestContext, admission: AdmissionController) -> ApiError:
    """The error of a request whose deadline has passed."""
    waited = time.monotonic() - context.started
    message = f"the response was not ready after {waited:.1f} s: try again later"
    if context.stages == {} and context.texts > 1:  # it was still embedding its own labels
        message += ", or have the label set registered in label_sets"
    return ApiError("deadline_exceeded", message, retry_after=admission.retry_after())


async def _send_error(error: ApiError, context: RequestContext, send: Send) -> None:
    if context.status:
        return
    context.code = error.code
    for message in error.messages():
        await send(message)
