"""Zero-shot labels in the shape of OpenAI's moderations: `POST /v1/moderations`.

It is the one call of OpenAI's clients that classifies images. The labels stand in `extra_body`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import FastAPI, Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from serve.fetch.recognition import is_image, is_url
from serve.http.errors import ApiError
from serve.http.json_response import LongList, make_response
from serve.http.responses import context_of, documented
from serve.label_sets.cache import EmbeddedLabelSet
from serve.label_sets.scoring import choose_thresholds, score_all_labels
from serve.routes.inputs import embed_classification, read_image_url, refuse_images
from serve.schemas import (
    BOUNDED,
    EXAMPLE_PNG,
    IMAGE_HELP,
    Fingerprint,
    ImageUrl,
    LabelQuery,
    Lenient,
    NonEmptyStrings,
    ResponseModel,
    Strict,
    Usage,
)
from serve.service import Service
from siglip.label_text.values import Share
from siglip.scoring import Floats

DEFAULT_THRESHOLD = 0.5
"""The score that flags a label which has no threshold of its own."""
LABELS = 10_000
"""Largest number of labels of an image. A result is written in one piece, and one of so many labels delays other
requests by some 30 ms."""
ALL = 2**31 - 1
"""A `top_k` that leaves out no label."""


class ModerationPart(Lenient):
    """An image to classify. Texts are refused."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | str | None = None


ModerationInput = Annotated[list[str | ModerationPart], BOUNDED, Field(min_length=1)]


class ModerationRequest(Strict):
    """Images, and the labels to score: exactly one of labels and a registered label set."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "tiny",
                    "input": [
                        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{EXAMPLE_PNG}"}},
                    ],
                    "labels": ["red square", "blue circle"],
                },
                {"model": "tiny:shapes", "input": f"data:image/png;base64,{EXAMPLE_PNG}"},
            ]
        }
    )

    model: str | None = Field(
        None, description="An id of GET /v1/models, or with the name of a registered label set: MODEL:LABEL_SET."
    )
    input: str | ModerationPart | ModerationInput = Field(description=f"One image or several. {IMAGE_HELP}")
    labels: NonEmptyStrings | None = Field(None, description="Label names.")
    label_set: str | None = Field(None, description="The name of a registered label set: see GET /v1/label-sets.")
    templates: NonEmptyStrings | None = Field(None, description="Prompts that contain {label}. Only with labels.")
    threshold: Share | None = Field(
        None,
        description="The score from which a label is flagged. Default: for sigmoid the label's own threshold in the "
        f"registered label set, if it is above 0; else {DEFAULT_THRESHOLD}.",
    )
    activation: Literal["sigmoid", "softmax"] = Field("sigmoid", description="As for /v1/classify.")
    top_k: int | None = Field(None, description="Refused: a response always has all labels.")
    user: str | None = Field(None, description="Ignored.")


class Moderation(ResponseModel):
    """The labels of one image, each with its score, its threshold, and whether the score reaches it."""

    flagged: bool = Field(description="Whether any label's score reaches its threshold.")
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["image"]]]
    category_thresholds: dict[str, float]


class ModerationResponse(ResponseModel):
    """One result for each image, in order."""

    id: str
    model: str
    results: list[Moderation]
    label_set: str | None = None
    usage: Usage
    fingerprint: Fingerprint


def add_moderation_routes(app: FastAPI, service: Service) -> None:
    """Register the route."""

    @app.post("/moderations", include_in_schema=False)
    @app.post(
        "/v1/moderations",
        response_model=ModerationResponse,
        responses=documented(400, 404),
        tags=["other clients"],
    )
    async def moderate(body: ModerationRequest, request: Request) -> Response:
        """Score labels for one or several images, for OpenAI's `client.moderations.create`.

        Unlike OpenAI's, the response has one result for each image of `input`. `/v1/classify` has more options.
        """
        context = context_of(request)
        query = _make_query(body, service)
        images = _list_images(body.input)
        params = [param for _, param in images]
        encoded = await service.image_reader.read([source for source, _ in images], params, context)
        label_set, vectors = await embed_classification(encoded, params, query, service, context, most_labels=LABELS)
        scores = await score_all_labels(vectors, label_set, query, context)
        content = {
            "id": f"modr-{context.request_id}",
            "model": service.name,
            "results": list_results(scores, choose_flags(label_set, query), label_set),
            "label_set": query.label_set,
            "usage": service.usage(context).model_dump(),
            "fingerprint": service.fingerprint(label_set.digest).model_dump(),
        }
        return await make_response(content, service, context)


def choose_flags(label_set: EmbeddedLabelSet, query: LabelQuery) -> Floats:
    """The scores from which labels are flagged, float32 (L,)."""
    if query.threshold is not None:
        return choose_thresholds(label_set, query)
    own = choose_thresholds(label_set, query)
    return np.where(own > 0, own, np.float32(DEFAULT_THRESHOLD))


def list_results(scores: Floats, thresholds: Floats, label_set: EmbeddedLabelSet) -> LongList:
    """The results of images with these scores (N, L), as `Moderation` describes them."""
    names = label_set.names
    fixed = {
        "category_applied_input_types": {name: ["image"] for name in names},
        "category_thresholds": dict(zip(names, thresholds, strict=True)),
    }
    written: list[dict[str, Any]] = []

    def list_some(start: int, stop: int) -> list[dict[str, Any]]:
        if not written:  # once for all images, and not in the event loop if there are many labels
            written.append(
                {
                    name: orjson.Fragment(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))
                    for name, value in fixed.items()
                }
            )
        results = []
        for row in scores[start:stop]:
            flags = row >= thresholds
            results.append(
                {
                    "flagged": bool(flags.any()),
                    "categories": dict(zip(names, flags.tolist(), strict=True)),
                    "category_scores": dict(zip(names, row, strict=True)),
                    **written[0],
                }
            )
        return results

    return LongList(len(scores), 4 * len(names), list_some)


def _make_query(body: ModerationRequest, service: Service) -> LabelQuery:
    """The labels to score, and how. Raises `ApiError`."""
    label_set = body.label_set
    prefix = f"{service.name}:"
    if body.model is not None and body.model.startswith(prefix):
        named = body.model.removeprefix(prefix)
        if label_set not in (None, named):
            raise ApiError("invalid_request", "label_set: model names another label set", param="label_set")
        label_set = named
    else:
        service.check_model(body.model)
    if body.top_k is not None:
        raise ApiError("invalid_request", "top_k: a response always has all labels: leave it out", param="top_k")
    if body.labels is None and label_set is None:
        raise ApiError(
            "invalid_request",
            "give labels or label_set (with OpenAI's client in extra_body), or send MODEL:LABEL_SET as the model",
            param="labels",
        )
    refuse_images(body.labels, "labels")
    refuse_images(body.templates, "templates")
    return LabelQuery(
        labels=body.labels,
        label_set=label_set,
        templates=body.templates,
        top_k=ALL,
        threshold=body.threshold,
        activation=body.activation,
    )


def _list_images(given: str | ModerationPart | list[str | ModerationPart]) -> list[tuple[str, str]]:
    """The images of a request, in order, each with the field that it came from. Raises `ApiError`."""
    if not isinstance(given, list):
        return [(_read_image(given, "input"), "input")]
    return [(_read_image(item, f"input.{n}"), f"input.{n}") for n, item in enumerate(given)]


def _read_image(item: str | ModerationPart, param: str) -> str:
    if isinstance(item, ModerationPart) and item.type == "image_url":
        if item.text is not None:
            raise ApiError("unsupported_input", f"{param}: an image with a text: send the image alone", param=param)
        return str(read_image_url(item.image_url, param).value)
    if isinstance(item, str) and (is_image(item) or is_url(item)):
        return item
    raise ApiError(
        "unsupported_input",
        f"{param}: a text: this model scores labels of images, and its scores of texts mean nothing: send a part of "
        "type image_url, or an image as a data: URI, base64 or URL",
        param=param,
    )
