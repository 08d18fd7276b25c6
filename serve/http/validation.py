"""Validation errors of pydantic and FastAPI as one `ApiError`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from serve.http.errors import ApiError
from serve.http.quoting import shorten
from serve.schemas import RequestModel


def describe_validation(errors: Sequence[Any]) -> ApiError:
    """Return one `ApiError` (status 400) for the validation errors of a request.

    It describes one of the errors and names its field. Of the request's values, the message has at most the short form
    of a field's name.
    """
    first = max(errors, key=lambda error: len(error["loc"]))  # of a union's branches, the one that matched most
    where = [shorten(str(part)) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(part for part in where if not _is_branch(part)) or None
    if first["loc"] == ("body",) and isinstance(first.get("input"), bytes):
        return ApiError("unsupported_media_type", "send the body as application/json and name it in Content-Type")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "no such field"
    return ApiError("invalid_request", f"{param or 'body'}: {message}", param=param)


def is_clients_error(error: ValidationError) -> bool:
    """Whether the values that a model refused came from a request: then the model is a request's, or a part of one.

    A refused value of a response, or of the configuration, is the server's own error.
    """
    return any(error.title == model.__name__ for model in _list_models(RequestModel))


def _list_models(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for model in base.__subclasses__():
        yield model
        yield from _list_models(model)


def _is_branch(part: str) -> bool:
    """Whether a part of a location is a branch of a union, such as `str` or `list[union[...]]`, and not a field."""
    return (
        part in ("str", "int", "float", "bool")
        or part.startswith(("list[", "tuple[", "literal["))
        or part[:1].isupper()
    )
