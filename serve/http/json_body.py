"""JSON bodies: large ones are parsed in a thread, so that the event loop can serve other requests meanwhile.

Python's JSON parser holds the GIL during a call, so the event loop runs only between two calls of the parser.
`serve.http.structure` limits how long one call takes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from serve.http.errors import ApiError
from serve.http.quoting import quote
from serve.http.validation import describe_validation

Body = TypeVar("Body", bound=BaseModel)
LARGE = 256 * 1024
"""Bytes from which a body is parsed in a thread."""
_NOT_PARSED = object()


class JsonRequest(Request):
    """A request whose JSON body is parsed in a thread if it is large. FastAPI calls `json` for a route's body model."""

    _parsed: Any = _NOT_PARSED

    async def json(self) -> Any:
        """The body as `json.loads` returns it, parsed once. Raises `ValueError` or `RecursionError`."""
        if self._parsed is _NOT_PARSED:
            body = await self.body()
            self._parsed = json.loads(body) if len(body) < LARGE else await asyncio.to_thread(json.loads, body)
        return self._parsed


class JsonRoute(APIRoute):
    """FastAPI's route with a `JsonRequest` for its `Request`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler that FastAPI calls for each request."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def media_type(request: Request) -> str:
    """The body's Content-Type in lower case, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request, model: type[Body], *other_types: str) -> Body:
    """Parse and validate a JSON body. `other_types` are the media types that the route reads besides JSON.

    Raises `ApiError`.
    """
    kind = media_type(request)
    if kind != "application/json" and not kind.endswith("+json"):
        expected = " or ".join(["application/json", *other_types])
        raise ApiError("unsupported_media_type", f"send {expected} and name it in Content-Type, not {quote(kind)}")
    try:
        return model.model_validate(await request.json())
    except ValidationError as error:
        raise describe_validation(error.errors()) from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "it is nested too deeply")
        raise ApiError("invalid_json", f"the body is not JSON: {reason}") from None
