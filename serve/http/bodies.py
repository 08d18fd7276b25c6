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
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, QueryParams, UploadFile
from starlette.responses import Response

from serve.config import EndpointLimits
from serve.http.errors import ApiError
from serve.http.validation import describe_validation

Parsed = TypeVar("Parsed")
Body = TypeVar("Body", bound=BaseModel)
MAX_ELEMENTS = 200_000
"""Commas, brackets and braces in a JSON body. 2,048 texts of 4,096 characters have some 160,000 commas."""
FORM_FIELDS = 16
"""Parts of a form that are neither images nor labels nor templates."""
ANY_IMAGE = "image/*"
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


def media_type(request: Request) -> str:
    """The body's Content-Type, without parameters and in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request, model: type[Body], *others: str) -> Body:
    """The JSON body as a model. `others` are the types that the route takes beside JSON. Raises `ApiError`."""
    kind = media_type(request)
    if kind != "application/json" and not kind.endswith("+json"):
        taken = " or ".join(["application/json", *others])
        raise ApiError("unsupported_media_type", f"send {taken}, and say so in Content-Type, not {kind!r}")
    try:
        return model.model_validate(await request.json())
    except ValidationError as error:
        raise describe_validation(error.errors()) from None
    except (ValueError, RecursionError) as error:
        raise ApiError("invalid_json", f"the body is not JSON: {getattr(error, 'msg', 'it nests too deep')}") from None


async def read_files(request: Request, limits: EndpointLimits) -> tuple[list[bytes], FormData | QueryParams] | None:
    """A body that is an image, or a form with some: their bytes, and the request's other fields. None if it is neither.

    The fields are the form's, or the query's of an image. Raises `ApiError`.
    """
    kind = media_type(request)
    if kind.startswith("image/"):
        return [await request.body()], request.query_params
    if kind != "multipart/form-data":
        return None
    # How many there may be is for the limits to say, which `check_structure` has seen to.
    most = form_parts(limits)
    async with request.form(max_files=most, max_fields=most, max_part_size=limits.body_bytes) as form:
        fields = FormData([item for item in form.multi_items() if item[0] not in ("image", "images")])
        for name, value in fields.multi_items():
            if isinstance(value, UploadFile):
                raise ApiError("invalid_request", f"{name}: a file where a value belongs", param=name)
        files = form.getlist("image") + form.getlist("images")
        if not files or not all(isinstance(file, UploadFile) for file in files):
            raise ApiError("invalid_request", "image: send at least one file, such as -F image=@cat.jpg", param="image")
        return [await file.read() for file in files if isinstance(file, UploadFile)], fields


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
