"""Bodies before they are parsed: what is too much of one is refused while it is still bytes, and what is large is
parsed off the event loop.

A megabyte of `{},{},{}` makes hundreds of thousands of objects, and a parser's time goes by those. The bound is on
the characters that can begin one, wherever they stand: it costs a scan at memory speed, and a text's own commas count
too. Python's parsers hold its lock, so a thread only lets the loop in between two of their calls.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from serve.config import EndpointLimits
from serve.errors import ApiError

Parsed = TypeVar("Parsed")
MAX_ELEMENTS = 200_000
"""Commas, brackets and braces in a JSON body. 256 texts of 4,096 characters have some 20,000 commas."""
FORM_FIELDS = 16
"""Parts of a form that are neither images nor labels nor templates."""
LARGE = 256 * 1024
"""Bytes of a body that is parsed in a thread."""
_BOUNDARY = re.compile(r'boundary=(?:"([^"]+)"|([^\s;]+))', re.IGNORECASE)


def check_structure(body: bytes, content_type: str, limits: EndpointLimits) -> None:
    """Refuse a body with more elements than any request has. Raises `ApiError`."""
    if content_type.lower().startswith("multipart/"):
        found = _BOUNDARY.search(content_type)
        boundary = (found[1] or found[2] if found else "").encode("latin-1")
        most = form_parts(limits)
        if boundary and body.count(b"--" + boundary) > most + 1:
            raise ApiError("invalid_request", f"the form has more than {most} parts: send fewer images or labels")
        return
    if len(body) > MAX_ELEMENTS and sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_ELEMENTS:
        raise ApiError(
            "invalid_request", f"the body has more than {MAX_ELEMENTS} commas, brackets and braces: send fewer items"
        )


def form_parts(limits: EndpointLimits) -> int:
    """Parts that a form may have: one more of each than is allowed, so that the limit itself is what is told."""
    return limits.images + 1 + 2 * (limits.labels + 1) + FORM_FIELDS


async def parse(parser: Callable[[bytes], Parsed], body: bytes) -> Parsed:
    """`parser(body)`, in a thread when it would take long."""
    return parser(body) if len(body) < LARGE else await asyncio.to_thread(parser, body)


class JsonRequest(Request):
    """A request whose body FastAPI gets parsed off the event loop."""

    async def json(self) -> Any:
        """The body as `json.loads` reads it. Raises what that raises."""
        if not hasattr(self, "_json"):
            self._json = await parse(json.loads, await self.body())
        return self._json


class JsonRoute(APIRoute):
    """A route that gets `JsonRequest`s."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return answer
