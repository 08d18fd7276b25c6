"""CORS: which web pages may call the API from a browser."""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from serve.http.errors import ApiError

CORS_SECONDS = 600
"""Seconds for which a browser may cache the CORS headers of a preflight response."""
METHODS = ("GET", "POST")
"""The methods that a page may use."""


class CorsMiddleware(CORSMiddleware):
    """Answers preflight requests, and adds the CORS headers to the responses for pages of `origins`.

    A preflight that is not allowed gets 403 in the error envelope. Every other response passes, without CORS headers if
    the request's origin is not one of `origins`: the browser then hides it from the page.
    """

    def __init__(self, app: ASGIApp, origins: list[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=["*"],
            expose_headers=["*"],
            max_age=CORS_SECONDS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the response to a preflight request, with the header by which a proxy knows the application's own."""
        started = time.perf_counter()
        response = super().preflight_response(request_headers)
        if response.status_code >= 400:
            error = ApiError(
                "origin_not_allowed",
                "pages of this origin may not send this request: the origin has to be in cors.origins, and the method "
                f"one of {', '.join(METHODS)}",
            )
            headers = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
            response = JSONResponse(error.body(), error.status_code, headers)
        response.headers["server-timing"] = f"total;dur={(time.perf_counter() - started) * 1000:.2f}"
        return response
