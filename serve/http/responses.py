"""Answers: models to JSON, and the errors that each route documents."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from serve.context import RequestContext
from serve.http.errors import CODES
from serve.schemas import Error

ALWAYS = (401, 403)
BUSY = (408, 413, 415, 429, 500, 503)
"""Statuses of any route, and those of routes that read a body and may wait for the model."""


class PydanticResponse(Response):
    """A model as JSON. It was built here, so it is not validated once more."""

    media_type = "application/json"

    def __init__(self, answer: BaseModel, status: int = 200) -> None:
        super().__init__(answer.model_dump_json(), status)


def context_of(request: Request) -> RequestContext:
    """What `serve.http.middleware` knows of this request."""
    context: RequestContext = request.scope["state"]["context"]
    return context


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for a route: its own error statuses and, if it has a body, those of all such routes."""
    wanted = {*statuses, *ALWAYS, *(BUSY if 400 in statuses else ())}
    answers: dict[int | str, dict[str, Any]] = {}
    for status in sorted(wanted):
        codes = {code: meaning for code, (known, meaning) in CODES.items() if known == status}
        examples = {
            code: {"value": {"error": {"message": meaning, "type": "...", "param": None, "code": code}}}
            for code, meaning in codes.items()
        }
        answers[status] = {
            "model": Error,
            "description": "; ".join(f"`{code}`: {meaning}" for code, meaning in codes.items()),
            "content": {"application/json": {"examples": examples}},
        }
    return answers


def body_of(model: type[BaseModel], **others: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's `requestBody` of a route that reads it by itself: JSON of a model, and other types by their schemas."""
    content = {"application/json": {"schema": _inline(model.model_json_schema())}}
    content |= {kind: {"schema": schema} for kind, schema in others.items()}
    return {"requestBody": {"required": True, "content": content}}


IMAGE_BODY: dict[str, Any] = {"type": "string", "format": "binary"}


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with what it refers to in place: OpenAPI looks for definitions elsewhere than pydantic puts them."""
    definitions = schema.pop("$defs", {})

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return walk(definitions[node["$ref"].rpartition("/")[2]])
        return {key: walk(value) for key, value in node.items() if key != "discriminator"}

    found: dict[str, Any] = walk(schema)
    return found
