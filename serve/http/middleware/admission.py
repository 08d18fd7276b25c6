"""Admission and the deadline of a request."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.admission.controller import AdmissionController
from serve.config import EndpointLimits
from serve.http.errors import ApiError
from serve.http.middleware.error_envelope import deadline_error
from serve.http.middleware.request_context import get_context

TIMEOUT = "x-request-timeout-seconds"
"""Ray Serve's own header. Its proxy gives up when this time has passed, so this server must give up a little earlier:
after the share `EARLIER` of it."""
EARLIER = 0.95


class AdmissionMiddleware:
    """Admits a request until its response is complete, and ends it at its deadline.

    Without keys (`has_keys` is false) one client may hold all that `limits.in_flight` allows.
    """

    def __init__(self, app: ASGIApp, limits: EndpointLimits, admission: AdmissionController, has_keys: bool) -> None:
        self._app = app
        self._limits = limits
        self._admission = admission
        self._has_keys = has_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = get_context(scope)
        seconds = _read_timeout(Headers(scope=scope), self._limits.deadline_s)
        with self._admission.admit(seconds, context.key if self._has_keys else None) as context.permit:
            try:
                async with asyncio.timeout(seconds):
                    await self._app(scope, receive, send)
            except TimeoutError:
                if not context.body_received:
                    raise ApiError("body_timeout", f"the body did not arrive within {seconds:g} s") from None
                raise deadline_error(context, self._admission) from None


def _read_timeout(headers: Headers, configured: float) -> float:
    """Seconds for a request: the configured deadline, or the time in its header if that is shorter.

    Raises `ApiError` for a header that is not a positive number.
    """
    given = headers.get(TIMEOUT)
    if given is None:
        return configured
    try:
        seconds = float(given) * EARLIER
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ApiError("invalid_request", "X-Request-Timeout-Seconds: send a number of seconds above 0")
    return min(configured, seconds)
