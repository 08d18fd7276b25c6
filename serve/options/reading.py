"""Reading the options of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from serve.embedding.vector_encoding import VectorEncoding
from serve.http.errors import ApiError
from serve.http.validation import describe_validation
from serve.options.choices import EmbeddingChoices, Refused, ScoreChoices
from serve.options.table import DIMENSIONS, EMBEDDING_OPTIONS, SCORE_OPTIONS, VendorOption
from serve.service import Service

NOTHING: Mapping[str, Any] = {}


def read_embedding_options(
    fields: Mapping[str, Any], service: Service, *, encodes: bool = False, parameters: Mapping[str, Any] = NOTHING
) -> EmbeddingChoices:
    """Read the options of a request for embeddings from all its fields; other fields and null have no effect.

    Without `encodes` the route's response has lists of floats, and any other encoding is refused. `parameters` are the
    fields of the request's `parameters`, where Hugging Face's clients put options. Raises `ApiError`.
    """
    choices = EmbeddingChoices()
    for option, value, param in _read(EMBEDDING_OPTIONS, fields, parameters, choices):
        if option.name in DIMENSIONS:
            service.check_dimensions(value, param)
        if not encodes and choices.encoding != VectorEncoding():
            message = f"{param}: this path's embeddings are lists of floats: leave it out"
            raise ApiError("invalid_request", message, param=param)
    return choices


def read_score_options(fields: Mapping[str, Any], parameters: Mapping[str, Any] = NOTHING) -> ScoreChoices:
    """Read the options of a classification; other fields and null have no effect. Raises `ApiError`."""
    choices = ScoreChoices()
    for _ in _read(SCORE_OPTIONS, fields, parameters, choices):
        pass
    return choices


def _read(
    options: Sequence[VendorOption], fields: Mapping[str, Any], parameters: Mapping[str, Any], choices: Any
) -> list[tuple[VendorOption, Any, str]]:
    """Apply the options that a request has to `choices`, and return them with their values and names."""
    read = []
    for option in options:
        value, param = fields.get(option.name), option.name
        if value is None:
            value, param = parameters.get(option.name), f"parameters.{option.name}"
        if value is None:
            continue
        try:
            value = option.adapter.validate_python(value)
            option.apply(choices, value, param)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise describe_validation([{**wrong, "loc": (param,)}]) from None
        except Refused as refused:
            raise ApiError("invalid_request", f"{param}: {refused}", param=param) from None
        read.append((option, value, param))
    return read
