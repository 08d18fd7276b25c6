"""JSON bodies: large ones are parsed in a thread, so that the event loop can serve other requests meanwhile.

Python's JSON parser holds the GIL during a call, so the event loop runs only between two calls of the parser.
`serve.http.bodies.structure` limits how long one call takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.responses import Response

from serve.http.errors import ApiError
from serve.http.middleware.request_context import get_context
from serve.http.quoting import quote, shorten
from serve.options.table import EMBEDDING_OPTIONS, SCORE_OPTIONS

Body = TypeVar("Body", bound=BaseModel)
DIGITS = 100
"""Digits of a whole number."""
FIELDS = frozenset(
    (
        *("model", "input", "inputs", "image", "images", "texts", "messages", "modality", "parameters"),
        *("text", "not", "like", "top", "cutoff", "fold", "thumbnails"),
        *("labels", "label_set", "templates", "candidate_labels", "hypothesis_template", "embedding_types"),
        *(option.name for option in (*EMBEDDING_OPTIONS, *SCORE_OPTIONS)),
    )
)
"""Names of fields that change a response."""
NAME_CHARACTERS = 1000
"""Characters of a field's name. Longer names are refused at once, because whatever handles them later copies them."""
_NOT_PARSED = object()


class JsonRequest(Request):
    """A request whose JSON body is parsed in a thread if it is large. FastAPI calls `json` for a route's body model."""

    _parsed: Any = _NOT_PARSED

    async def json(self) -> Any:
        """The body as `parse_json` returns it, parsed once. Raises `ApiError`."""
        if self._parsed is _NOT_PARSED:
            refuse_query(self)
            body = await self.body()
            self._parsed = await get_context(self.scope).work(parse_json, body, size=len(body))
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

    Raises `ApiError`, and pydantic's `ValidationError`, which `serve.http.app` makes an `ApiError`.
    """
    kind = media_type(request)
    if kind != "application/json" and not kind.endswith("+json"):
        expected = " or ".join(["application/json", *other_types])
        raise ApiError("unsupported_media_type", f"send {expected} and name it in Content-Type, not {quote(kind)}")
    return model.model_validate(await request.json())


def refuse_query(request: Request) -> None:
    """Refuse fields in the query of a request whose fields stand in the body: they would be ignored.

    Parameters that are no fields, such as Azure's `api-version`, have no effect. Raises `ApiError`.
    """
    for name in request.query_params:
        if name in FIELDS:
            message = f"{name}: it stands in the query, and this request's fields are read from its body: move it there"
            raise ApiError("invalid_request", message, param=name)


def parse_json(body: bytes) -> Any:
    """Parse JSON (RFC 8259): UTF-8, with or without a byte order mark. Raises `ApiError`, which says what is wrong.

    Unlike Python's parser it accepts neither UTF-16 nor NaN and Infinity, nor an object with a name that stands twice:
    the last one would win, and the client would not know. Nor does it accept half of a surrogate pair, which JSON can
    write and UTF-8 cannot: whatever repeats such a text would fail.
    """
    try:
        parsed = json.loads(
            body.decode("utf-8-sig"),
            object_pairs_hook=_make_object,
            parse_constant=_refuse_constant,
            parse_int=_read_int,
        )
        if b"\\" in body and (b"\\ud" in body or b"\\uD" in body):  # the escapes of all surrogates, also of pairs
            _check_surrogates(parsed)
        return parsed
    except UnicodeDecodeError as error:
        why = f"it is not UTF-8: byte {error.start} cannot be read"
    except json.JSONDecodeError as error:
        why = f"{error.msg} (line {error.lineno}, column {error.colno})"
    except RecursionError:
        why = "it is nested too deeply"
    raise ApiError("invalid_json", f"the body is not JSON: {why}")


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    for name in made:
        if len(name) > NAME_CHARACTERS:
            raise ApiError("invalid_request", f"no such field: {quote(name)}", param=name)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ApiError("invalid_request", f"{shorten(name)}: the field stands twice: send it once", param=name)
            seen.add(name)
    return made


def _check_surrogates(parsed: Any) -> None:
    """Refuse a string, or a name, with half of a surrogate pair. Raises `ApiError`, which names the field."""
    rest: list[tuple[Any, _Place | None]] = [(parsed, None)]
    while rest:
        value, place = rest.pop()
        if isinstance(value, dict):
            rest += [(name, place) for name in value if not name.isascii()]
            rest += [(item, (name, place)) for name, item in value.items()]
        elif isinstance(value, list):
            rest += [(item, (number, place)) for number, item in enumerate(value)]
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                param = _name_place(place)
                message = f"{param or 'body'}: half of a surrogate pair is not valid text"
                raise ApiError("invalid_request", message, param=param) from None


_Place = tuple[str | int, Any]
"""Where a value stands: its name or number, and the place of what contains it. A path as text, for each of a hundred
thousand values, could take gigabytes."""


def _name_place(place: _Place | None) -> str | None:
    names = []
    while place is not None:
        names.append(shorten(str(place[0])))
        place = place[1]
    return ".".join(reversed(names)) or None


def _read_int(text: str) -> int:
    if len(text) > DIGITS:  # reading thousands of digits takes a time that grows with their square
        raise ApiError("invalid_json", f"the body is not JSON: it has a whole number of more than {DIGITS} digits")
    return int(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError("invalid_json", f"the body is not JSON: {name} is not a number of JSON")
