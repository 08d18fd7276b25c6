"""The structure check of a body: a body with too many elements is refused before it is parsed.

A megabyte of `{},{},{}` makes hundreds of thousands of Python objects, and a parser's time is proportional to those.
The check counts the characters that can begin an element: a scan at memory speed. Only if there are too many does it
leave out those within strings, which takes a few times as long: prose has a comma in each line.
"""

from __future__ import annotations

import re

from serve.config import EndpointLimits
from serve.http.errors import ApiError

MAX_ELEMENTS = 200_000
"""Commas, brackets and braces in a JSON body, outside its strings."""
_MARKS = (b",", b"[", b"{")
FORM_FIELDS = 16
"""Parts of a form that are neither images nor labels nor templates."""
_BOUNDARY = re.compile(r'boundary=(?:"([^"]+)"|([^\s;]+))', re.IGNORECASE)


def check_structure(body: bytes, content_type: str, limits: EndpointLimits) -> None:
    """Refuse a body with more elements or form parts than any valid request has. Raises `ApiError`."""
    if content_type.lower().startswith("multipart/"):
        found = _BOUNDARY.search(content_type)
        boundary = (found[1] or found[2] if found else "").encode("latin-1")
        most = max_form_parts(limits)
        if boundary and body.count(b"--" + boundary) > most + 1:
            raise ApiError("invalid_request", f"the form has more than {most} parts: send fewer images or labels")
        return
    objects = _max_objects(limits)
    few_strings = body.count(b'"') <= 4 * MAX_ELEMENTS  # else the bound of all elements refuses the body
    if few_strings and body.count(b"{") > objects and _list_outside(body).count(b"{") > objects:
        raise ApiError("invalid_request", f"the body has more than {objects} objects: send fewer items")
    if len(body) > MAX_ELEMENTS and _count(body) > MAX_ELEMENTS and _count_outside(body) > MAX_ELEMENTS:
        raise ApiError(
            "invalid_request", f"the body has more than {MAX_ELEMENTS} commas, brackets and braces: send fewer items"
        )


def _max_objects(limits: EndpointLimits) -> int:
    """The most JSON objects of a body: four for each text and image, which may be parts of messages, and some more."""
    return 4 * (limits.texts + limits.images) + 1000


def _count(body: bytes) -> int:
    return sum(body.count(mark) for mark in _MARKS)


def _count_outside(body: bytes) -> int:
    """The characters that can begin an element, outside JSON strings. Many strings count as many elements."""
    unescaped = _unescape(body)
    strings = unescaped.count(b'"') // 2
    if strings > 2 * MAX_ELEMENTS:  # keys and values
        return strings
    return _count(_list_outside(body))


def _list_outside(body: bytes) -> bytes:
    """What stands outside the strings of a JSON body."""
    return b"".join(_unescape(body).split(b'"')[::2])


def _unescape(body: bytes) -> bytes:
    return body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body


def max_form_parts(limits: EndpointLimits) -> int:
    """The most parts of a form: one more image, label and template than allowed, so that a form with slightly too many
    is refused with the error of the limit itself."""
    return limits.images + 1 + 2 * (limits.labels + 1) + FORM_FIELDS
