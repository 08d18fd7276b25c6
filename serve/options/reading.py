"""Reading the options of a request."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from serve.embedding.vector_encoding import VectorEncoding
from serve.http.errors import ApiError
from serve.http.validation import describe_validation
from serve.options.choices import EmbeddingChoices, Refused, ScoreChoices
from serve.options.table import DIMENSIONS, EMBEDDING_OPTIONS, SCORE_OPTIONS, VendorOption
from serve.options.unknown import refuse_unknown
from serve.service import Service

_EMBEDDING_NAMES = frozenset(option.name for option in EMBEDDING_OPTIONS)
_SCORE_NAMES = frozenset(option.name for option in SCORE_OPTIONS)


def read_embedding_options(
    fields: Mapping[str, Any], service: Service, *, known: Collection[str], encodes: bool = False
) -> EmbeddingChoices:
    """Read the options of a request for embeddings from its fields, and from its `parameters`, if they are an object.

    `fields` are those that are no field of the request's model, whose fields are `known`. Null counts as not given.
    Without `encodes` the route's response has lists of floats, and any other encoding is refused. Options of
    classifications are refused, and unknown fields as `serve.options.unknown` says. Raises `ApiError`.
    """
    parameters = _get_parameters(fields)
    for place, inner in (("", fields), ("parameters.", parameters)):
        for option in SCORE_OPTIONS:
            if inner.get(option.name) is not None:
                param = f"{place}{option.name}"
                message = f"{param}: without candidate_labels the response has embeddings, not scores: leave it out"
                raise ApiError("invalid_request", message, param=param)
        refuse_unknown(inner, {*known, *_EMBEDDING_NAMES, "parameters"} if not place else _EMBEDDING_NAMES, place)
    choices = EmbeddingChoices()
    for option, value, param in _read(EMBEDDING_OPTIONS, fields, parameters, choices):
        if option.name in DIMENSIONS:
            service.check_dimensions(value, param)
        if not encodes and choices.encoding != VectorEncoding():
            message = f"{param}: this path's embeddings are lists of floats: leave it out"
            raise ApiError("invalid_request", message, param=param)
    return choices


def read_score_options(
    fields: Mapping[str, Any], parameters: Mapping[str, Any], known: Collection[str], known_parameters: Collection[str]
) -> ScoreChoices:
    """Read the options of a classification from a request's fields and its `parameters`.

    `known` and `known_parameters` are the fields that are no options. Options of embeddings, and fields as
    `serve.options.unknown` says, are refused. Null counts as not given. Raises `ApiError`.
    """
    for place, inner, names in (("", fields, known), ("parameters.", parameters, known_parameters)):
        for option in EMBEDDING_OPTIONS:
            if inner.get(option.name) is not None and option.name not in names:
                param = f"{place}{option.name}"
                message = f"{param}: with candidate_labels the response has scores, not embeddings: leave it out"
                raise ApiError("invalid_request", message, param=param)
        refuse_unknown(inner, {*names, *_SCORE_NAMES}, place)
    choices = ScoreChoices()
    for _ in _read(SCORE_OPTIONS, fields, parameters, choices):
        pass
    return choices


def _get_parameters(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The request's `parameters`, where Hugging Face's clients put options; no fields if there are none."""
    parameters = fields.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise ApiError("invalid_request", "parameters: expected an object with options", param="parameters")
    return parameters


def _read(
    options: Sequence[VendorOption], fields: Mapping[str, Any], parameters: Mapping[str, Any], choices: Any
) -> list[tuple[VendorOption, Any, str]]:
    """Apply the options that a request has to `choices`, and return them with their values and names.

    An option may stand in `fields` or in `parameters`, and not in both with two values.
    """
    read = []
    for option in options:
        value, param = fields.get(option.name), option.name
        inner = parameters.get(option.name)
        if value is not None and inner is not None and value != inner:
            message = f"parameters.{option.name}: {option.name} stands beside parameters with another value: send one"
            raise ApiError("invalid_request", message, param=f"parameters.{option.name}")
        if value is None:
            value, param = inner, f"parameters.{option.name}"
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
