"""The bytes of images out of the strings that hold them."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from urllib.parse import unquote_to_bytes

from serve.errors import ApiError
from serve.fetch import Fetcher, FetchRefused

FETCH_STATUS = {"fetch_failed": 400, "fetch_timeout": 400, "fetch_too_large": 413, "fetch_forbidden": 403}
"""Statuses of refused URLs, where it is not 400. None is a 5xx: the URL was the caller's."""


async def read_images(sources: Sequence[str], params: Sequence[str], fetcher: Fetcher) -> list[bytes]:
    """Encoded images out of data: URIs, base64 or URLs. `params` name the fields that they came from.

    Raises `ApiError`.
    """
    if not any(is_url(source) for source in sources):
        return [read_inline(source, param) for source, param in zip(sources, params, strict=True)]
    async with asyncio.TaskGroup() as group:
        reading = [
            group.create_task(_read(source, param, fetcher)) for source, param in zip(sources, params, strict=True)
        ]
    return [task.result() for task in reading]


def is_url(source: str) -> bool:
    """Whether an image is to be fetched."""
    return source[:8].lower().startswith(("http://", "https://"))


def is_data_uri(source: str) -> bool:
    """Whether a string holds an image by its own account."""
    return source[:5].lower() == "data:"


def read_inline(source: str, param: str) -> bytes:
    """An encoded image out of a data: URI (RFC 2397) or base64. Raises `ApiError`."""
    data = source
    if is_data_uri(source):
        media, comma, data = source.partition(",")
        if not comma:
            raise ApiError("invalid_image", f"{param}: the data: URI has no comma before its data", param=param)
        if not media.lower().endswith(";base64"):
            return unquote_to_bytes(data)
    try:
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error):
        pass
    try:
        # Broken into lines as the command line tool does, or in the alphabet that is safe in URLs.
        joined = "".join(data.split()).translate(str.maketrans("-_", "+/"))
        return base64.b64decode(joined + "=" * (-len(joined) % 4), validate=True)
    except (ValueError, binascii.Error):
        raise ApiError(
            "invalid_image", f"{param}: neither base64 nor a data: URI nor an http(s) URL", param=param
        ) from None


async def _read(source: str, param: str, fetcher: Fetcher) -> bytes:
    if not is_url(source):
        return read_inline(source, param)
    try:
        return await fetcher.fetch(source)
    except FetchRefused as refused:
        status = FETCH_STATUS.get(refused.code, 400)
        raise ApiError(refused.code, f"{param}: {refused.message}", status=status, param=param) from None
