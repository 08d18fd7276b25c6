"""Bodies that are an image file, and forms with image files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from urllib.parse import parse_qsl

import orjson
from fastapi import Request
from starlette.datastructures import FormData, QueryParams

from serve.config import EndpointLimits
from serve.http.bodies.forms import parse_form
from serve.http.bodies.json_body import media_type, refuse_query
from serve.http.bodies.structure import max_form_parts
from serve.http.errors import ApiError
from serve.http.middleware.request_context import get_context
from serve.http.quoting import shorten

ANY_IMAGE = "image/*"
IMAGES = ("image", "images")
"""Names of a form's image files."""
REPEATED = ("labels", "templates", "candidate_labels")
"""Other fields that a form or a query may have several times. Of all others, one would silently win."""


async def read_uploads(request: Request, limits: EndpointLimits) -> tuple[list[bytes], FormData | QueryParams] | None:
    """Read the image files of a body and the request's other fields; None if the body is neither an image nor a form.

    The fields are those of the form or, if the body is an image, those of the query. Raises `ApiError`.
    """
    fields: list[tuple[str, str]] = []
    images: list[bytes] = []
    kind = media_type(request)
    if kind.startswith("image/"):
        fields = _read_query(request.scope["query_string"])
        _check_repeated(fields)
        return [await request.body()], QueryParams(fields)
    if kind != "multipart/form-data":
        return None
    refuse_query(request)
    body = await request.body()
    arguments = body, request.headers["content-type"], max_form_parts(limits)
    parts = await get_context(request.scope).work(parse_form, *arguments, size=len(body))
    for part in parts:
        if (part.name in IMAGES) != isinstance(part.value, bytes):
            if part.name in IMAGES:
                message = f"{part.name}: a value where a file is expected: send one such as -F image=@cat.jpg"
            else:
                message = f"{shorten(part.name)}: a file where a value is expected: an image's part is named image"
            raise ApiError("invalid_request", message, param=part.name)
        if isinstance(part.value, bytes):
            images.append(part.value)
        else:
            fields.append((part.name, part.value))
    if not images:
        raise ApiError("invalid_request", "image: send at least one file, such as -F image=@cat.jpg", param="image")
    _check_repeated(fields)
    return images, FormData([*fields])


def _read_query(query: bytes) -> list[tuple[str, str]]:
    """The names and values of a query, percent-encoded or as they are, in UTF-8. Raises `ApiError`."""
    try:
        return parse_qsl(query.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise ApiError("invalid_request", "the query is not valid UTF-8") from None


def _is_list(value: str) -> bool:
    """Whether a value is a list in JSON. `[a]` is none."""
    if not value.lstrip().startswith("["):
        return False
    try:
        return isinstance(orjson.loads(value), list)
    except orjson.JSONDecodeError:
        return False


def _check_repeated(fields: Sequence[tuple[str, str]]) -> None:
    """Refuse a field that stands twice and may not, and a list in JSON where the field is to be repeated.

    The list would be one label. A field that is repeated has names that look like lists. Raises `ApiError`.
    """
    seen: set[str] = set()
    counts = Counter(name for name, _ in fields)
    for name, value in fields:
        if name in REPEATED and counts[name] == 1 and _is_list(value):
            message = f"{name}: a list in a form or a query is the field repeated: send one {name} for each"
            raise ApiError("invalid_request", message, param=name)
        if name in seen and name not in REPEATED:
            raise ApiError("invalid_request", f"{shorten(name)}: the field stands twice: send it once", param=name)
        seen.add(name)
