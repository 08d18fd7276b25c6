"""Answers: models to JSON, and the errors that each route documents."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from serve.errors import CODES
from serve.schemas import Error
from serve.service import Trace

ALWAYS = (401, 403)
BUSY = (408, 413, 415, 429, 500, 503)
"""Statuses of any route, and those of routes that read a body and may wait for the model."""


class Reply(Response):
    """A model as JSON. It was built here, so it is not validated once more."""

    media_type = "application/json"

    def __init__(self, answer: BaseModel, status: int = 200) -> None:
        super().__init__(answer.model_dump_json(), status)


def trace_of(request: Request) -> Trace:
    """What `serve.front` knows of this request."""
    trace: Trace = request.scope["state"]["trace"]
    return trace


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
