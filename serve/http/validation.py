"""Validation errors of pydantic and FastAPI as one `ApiError`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.http.errors import ApiError
from serve.http.quoting import shorten


def describe_validation(errors: Sequence[Any]) -> ApiError:
    """Return one `ApiError` (status 400) for the validation errors of a request.

    It describes one of the errors and names its field. The message never includes a value from the request.
    """
    first = max(errors, key=lambda error: len(error["loc"]))  # of a union's branches, the one that matched most
    where = [shorten(str(part)) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(part for part in where if not _is_branch(part)) or None
    if first["type"] in ("json_invalid", "json_type"):
        return ApiError("invalid_json", f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["loc"] == ("body",) and isinstance(first.get("input"), bytes):
        return ApiError("unsupported_media_type", "send the body as application/json and name it in Content-Type")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "no such field"
    return ApiError("invalid_request", f"{param or 'body'}: {message}", param=param)


def _is_branch(part: str) -> bool:
    """Whether a part of a location is a branch of a union, such as `str` or `list[union[...]]`, and not a field."""
    return part in ("str", "int", "float", "bool") or part.startswith(("list[", "tuple[")) or part[:1].isupper()
