"""Responses of the routes: pydantic models as JSON, and the OpenAPI documentation of errors and bodies."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from serve.context import RequestContext
from serve.http.errors import CODES
from serve.http.middleware.request_context import get_context
from serve.schemas import Error

ALWAYS = (401, 403)
"""Error statuses of every route."""
BUSY = (408, 413, 415, 429, 500, 503)
"""Error statuses of routes that read a body and may wait for the model."""
IMAGE_BODY: dict[str, Any] = {"type": "string", "format": "binary"}
"""The OpenAPI schema of an image file."""


class PydanticResponse(Response):
    """A pydantic model as JSON. The server made the model, so it is not validated again, as FastAPI would."""

    media_type = "application/json"

    def __init__(self, content: BaseModel, status: int = 200) -> None:
        super().__init__(content.model_dump_json(), status)


def context_of(request: Request) -> RequestContext:
    """The request's context, made by `serve.http.middleware.request_context`."""
    return get_context(request.scope)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` of a route: its own error statuses and those that its kind of route always has.

    A route that lists 400 has a body, so it also gets the statuses of `BUSY`.
    """
    wanted = {*statuses, *ALWAYS, *(BUSY if 400 in statuses else ())}
    responses: dict[int | str, dict[str, Any]] = {}
    for status in sorted(wanted):
        codes = {code: meaning for code, (known, meaning) in CODES.items() if known == status}
        examples = {
            code: {"value": {"error": {"message": meaning, "type": "...", "param": None, "code": code}}}
            for code, meaning in codes.items()
        }
        responses[status] = {
            "model": Error,
            "description": "; ".join(f"`{code}`: {meaning}" for code, meaning in codes.items()),
            "content": {"application/json": {"examples": examples}},
        }
    return responses


def body_of(model: type[BaseModel], **other_types: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's `requestBody` of a route that reads its body itself: JSON of `model`, and schemas of other types."""
    content = {"application/json": {"schema": _inline(model.model_json_schema())}}
    content |= {kind: {"schema": schema} for kind, schema in other_types.items()}
    return {"requestBody": {"required": True, "content": content}}


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema in which each `$ref` is replaced with its definition, and which has no `$defs`.

    pydantic puts definitions under `$defs`, and OpenAPI expects them under `components/schemas`. The schema must not
    refer to itself.
    """
    definitions = schema.pop("$defs", {})

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return walk(definitions[node["$ref"].rpartition("/")[2]])
        return {key: walk(value) for key, value in node.items() if key != "discriminator"}

    inlined: dict[str, Any] = walk(schema)
    return inlined
