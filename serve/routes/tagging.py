"""Sightline's own API: `POST /v1/classify`, `POST /v1/similarity`, `GET /v1/label-sets`."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from pydantic import ConfigDict, Field
from starlette.datastructures import FormData, QueryParams
from starlette.responses import Response

from serve.config import EndpointLimits
from serve.http.bodies.json_body import read_json
from serve.http.bodies.uploads import ANY_IMAGE, read_uploads
from serve.http.errors import ApiError
from serve.http.json_response import LongList, make_response
from serve.http.responses import PydanticResponse, body_of, context_of, documented
from serve.label_sets.scoring import score_labels
from serve.routes.inputs import embed_classification, read_text, refuse_images
from serve.schemas import (
    EXAMPLE_PNG,
    IMAGE_HELP,
    Fingerprint,
    LabelQuery,
    LabelScore,
    NonEmptyStrings,
    ResponseModel,
    Strict,
    Usage,
)
from serve.service import Service
from siglip.label_text.values import Count
from siglip.scoring import Floats, Scale, score_pairs, sigmoid

_MANY = ("labels", "templates")
"""Fields of a form or a query that may be repeated."""
_FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["image"],
    "properties": {
        "image": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1},
        "labels": {"type": "array", "items": {"type": "string"}},
        "label_set": {"type": "string"},
        "templates": {"type": "array", "items": {"type": "string"}},
        "top_k": {"type": "integer", "minimum": 1},
        "threshold": {"type": "number", "minimum": 0, "maximum": 1},
        "activation": {"type": "string", "enum": ["sigmoid", "softmax"]},
        "model": {"type": "string"},
    },
}
"""The schema of a multipart body: image files, and the other fields of the JSON body. `image`, `labels` and `templates`
may be repeated."""


class ClassifyRequest(LabelQuery):
    """One or several images, and the labels to score."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"image": EXAMPLE_PNG, "labels": ["red square", "blue circle"]},
                {"images": [EXAMPLE_PNG, EXAMPLE_PNG], "label_set": "shapes", "top_k": 3, "threshold": 0.1},
            ]
        }
    )

    model: str | None = Field(None, description="An id of GET /v1/models. Optional.")
    image: str | None = Field(None, description=f"{IMAGE_HELP} Exactly one of image and images.")
    images: NonEmptyStrings | None = Field(None, description="Several images, each as in image.")


class Classification(ResponseModel):
    """The labels of one image, best first. The list is empty if no label reached its threshold."""

    object: Literal["classification"] = "classification"
    index: int
    labels: list[LabelScore]


class ClassifyResponse(ResponseModel):
    """The classifications, in the order of the images."""

    object: Literal["list"] = "list"
    model: str
    label_set: str | None = None
    data: list[Classification]
    usage: Usage
    fingerprint: Fingerprint


class SimilarityRequest(Strict):
    """Texts and images to compare with each other."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"texts": ["a red square", "a blue circle"], "images": [EXAMPLE_PNG], "top_k": 1}]
        }
    )

    model: str | None = Field(None, description="An id of GET /v1/models. Optional.")
    texts: NonEmptyStrings
    images: NonEmptyStrings = Field(description=IMAGE_HELP)
    top_k: Count | None = Field(None, description="At most this many matches for each text and image; default all.")


class Match(ResponseModel):
    """A text or an image that matches, by its index in the request."""

    index: int
    cosine: float
    score: float = Field(description="The model's probability that the text and the image match.")


class Ranking(ResponseModel):
    """The matches of one text or image, best first."""

    index: int
    matches: list[Match]


class SimilarityResponse(ResponseModel):
    """Matches in both directions: images for each text and texts for each image."""

    object: Literal["similarity"] = "similarity"
    model: str
    texts: list[Ranking] = Field(description="For each text, the matching images.")
    images: list[Ranking] = Field(description="For each image, the matching texts.")
    usage: Usage
    fingerprint: Fingerprint


class LabelSetCard(ResponseModel):
    """A registered label set."""

    id: str
    object: Literal["label_set"] = "label_set"
    labels: list[str]
    templates: list[str]
    threshold: float
    top_k: int | None
    fingerprint: Fingerprint


class LabelSetList(ResponseModel):
    """The registered label sets."""

    object: Literal["list"] = "list"
    data: list[LabelSetCard]


def add_tagging_routes(app: FastAPI, service: Service) -> None:
    """Register the routes."""

    @app.post(
        "/v1/classify",
        response_model=ClassifyResponse,
        responses=documented(400, 404),
        openapi_extra=body_of(ClassifyRequest, **{"multipart/form-data": _FORM_SCHEMA}),
        tags=["classification"],
    )
    async def classify(request: Request) -> Response:
        """Score labels for one or several images.

        Scores are probabilities. They are independent of each other unless `activation` is softmax. They are usually
        low: 0.1 to 0.5 for a correct label.
        """
        context = context_of(request)
        query, model, sources, images, params = await _read_classify(request, service.config.limits)
        service.check_model(model)
        refuse_images(query.labels, "labels")
        refuse_images(query.templates, "templates")
        if sources:
            images = await service.image_reader.read(sources, params, context)
        label_set, vectors = await embed_classification(images, params, query, service, context)
        scored = await score_labels(vectors, label_set, query, context)
        content = {
            "object": "list",
            "model": service.name,
            "label_set": query.label_set,
            "data": [
                {"object": "classification", "index": index, "labels": labels}
                for index, labels in enumerate(scored.labels)
            ],
            "usage": service.usage(context).model_dump(),
            "fingerprint": service.fingerprint(label_set.digest).model_dump(),
        }
        return await make_response(content, service, context)

    @app.post(
        "/v1/similarity", response_model=SimilarityResponse, responses=documented(400, 404), tags=["classification"]
    )
    async def compare(body: SimilarityRequest, request: Request) -> Response:
        """Rank images for each text, and texts for each image.

        Texts are embedded without a template.
        """
        context = context_of(request)
        service.check_model(body.model)
        for n, text in enumerate(body.texts):
            read_text(text, f"texts.{n}", instead="send it in images")
        checked = await service.embedder.check_texts(
            body.texts, [f"texts.{n}" for n in range(len(body.texts))], context
        )
        params = [f"images.{n}" for n in range(len(body.images))]
        data = await service.image_reader.read(body.images, params, context)
        text_count, image_count = len(body.texts), len(data)
        pairs = text_count * min(image_count, body.top_k or image_count)
        pairs += image_count * min(text_count, body.top_k or text_count)
        await service.embedder.admit(context, images=image_count, texts=text_count, pairs=pairs)
        texts = await service.embedder.embed_texts(checked, context)
        images = await service.embedder.embed_images(data, params, context)
        step = partial(rank_pairs, texts, images, service.about.scale, body.top_k)
        [(by_text, by_image)] = await context.work_on([step])
        content = {
            "object": "similarity",
            "model": service.name,
            "texts": by_text,
            "images": by_image,
            "usage": service.usage(context).model_dump(),
            "fingerprint": service.fingerprint().model_dump(),
        }
        return await make_response(content, service, context)

    @app.get("/v1/label-sets", response_model=LabelSetList, responses=documented(), tags=["classification"])
    async def list_label_sets() -> PydanticResponse:
        """The registered label sets of the configuration. Their prompts are embedded already."""
        return PydanticResponse(
            LabelSetList(
                data=[
                    LabelSetCard(
                        id=name,
                        labels=one.embedded.names,
                        templates=list(one.labels.templates),
                        threshold=one.labels.threshold,
                        top_k=one.labels.top_k,
                        fingerprint=service.fingerprint(one.embedded.digest),
                    )
                    for name, one in service.label_sets.registered.items()
                ]
            )
        )


def rank_pairs(texts: Floats, images: Floats, scale: Scale, top_k: int | None) -> tuple[LongList, LongList]:
    """Rank the images for each of the texts (T, D), and the texts for each of the images (I, D), best first.

    Each has at most `top_k` matches; None is all. Equal cosines keep the order of the request. The elements of the
    lists are what `Ranking` describes.
    """
    cosines = texts @ images.T
    scores = sigmoid(score_pairs(texts, images, scale))
    return _rank(cosines, scores, top_k), _rank(cosines.T, scores.T, top_k)


def _rank(cosines: Floats, scores: Floats, top_k: int | None) -> LongList:
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :top_k]
    best = np.take_along_axis(cosines, order, axis=1), np.take_along_axis(scores, order, axis=1)

    def list_rankings(start: int, stop: int) -> list[dict[str, Any]]:
        return [
            {
                "index": row,
                "matches": [
                    {"index": index, "cosine": cosine, "score": score}
                    for index, cosine, score in zip(order[row].tolist(), best[0][row], best[1][row], strict=True)
                ],
            }
            for row in range(start, stop)
        ]

    return LongList(len(order), 3 * order.shape[1], list_rankings)


Parsed = tuple[LabelQuery, str | None, list[str], list[bytes], list[str]]
"""The query, the model's name, the images as strings or as encoded bytes, and the fields that the images came from."""


async def _read_classify(request: Request, limits: EndpointLimits) -> Parsed:
    """Read a body that is JSON, an image file or a form. Raises `ApiError`."""
    uploads = await read_uploads(request, limits)
    if uploads is not None:
        return _read_fields(*uploads)
    body = await read_json(request, ClassifyRequest, ANY_IMAGE, "multipart/form-data")
    if (body.image is None) == (body.images is None):
        raise ApiError("invalid_request", "give exactly one of image and images", param="image")
    if body.image is not None:
        return body, body.model, [body.image], [], ["image"]
    sources = list(body.images or ())
    return body, body.model, sources, [], [f"images.{n}" for n in range(len(sources))]


def _read_fields(images: list[bytes], raw: FormData | QueryParams) -> Parsed:
    """The query of a form or a URL, as JSON would have it. Numbers stay strings, which pydantic converts.

    Raises pydantic's `ValidationError`, which `serve.http.app` makes an `ApiError`.
    """
    fields: dict[str, Any] = {}
    for name in raw:
        values = raw.getlist(name)
        fields[name] = values if name in _MANY else values[0]
    model = fields.pop("model", None)
    query = LabelQuery.model_validate(fields)
    return query, str(model) if model else None, [], images, [f"image.{n}" for n in range(len(images))]
