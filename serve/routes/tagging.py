"""`POST /v1/classify`, `POST /v1/similarity`, `GET /v1/label-sets`: Sightline's own shapes."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from pydantic import ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, QueryParams

from serve.config import EndpointLimits
from serve.http.errors import ApiError
from serve.http.json_body import read_json
from serve.http.responses import PydanticResponse, body_of, context_of, documented
from serve.http.uploads import ANY_IMAGE, read_uploads
from serve.http.validation import describe_validation
from serve.label_sets.scoring import score_labels
from serve.schemas import (
    IMAGE_HELP,
    PIXEL,
    Fingerprint,
    LabelQuery,
    Labels,
    LabelScore,
    ResponseModel,
    Strict,
    Usage,
)
from serve.service import Service
from siglip.scoring import Floats, score_pairs, sigmoid

_MANY = ("labels", "templates")
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
"""The multipart body: files, and the JSON body's other fields. `image`, `labels` and `templates` may be repeated."""


class ClassifyRequest(LabelQuery):
    """One or many images, and what to ask of them."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"image": PIXEL, "labels": ["red square", "blue circle"]},
                {"images": [PIXEL, PIXEL], "label_set": "shapes", "top_k": 3, "threshold": 0.1},
            ]
        }
    )

    model: str | None = Field(None, description="An id of GET /v1/models; may be left out.")
    image: str | None = Field(None, description=f"{IMAGE_HELP} Exactly one of image and images.")
    images: Labels | None = Field(None, description="Several of them.")


class Classification(ResponseModel):
    """One image's labels, best first. Empty when none reached its threshold."""

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
    """Texts against images."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"texts": ["a red square", "a blue circle"], "images": [PIXEL], "top_k": 1}]}
    )

    model: str | None = Field(None, description="An id of GET /v1/models; may be left out.")
    texts: Labels
    images: Labels = Field(description=IMAGE_HELP)
    top_k: int | None = Field(None, ge=1, description="At most this many matches of each; default all.")


class Match(ResponseModel):
    """A text or an image that was found, by its index in the request."""

    index: int
    cosine: float
    score: float = Field(description="The model's probability that they belong together.")


class Ranking(ResponseModel):
    """The matches of one text or image, best first."""

    index: int
    matches: list[Match]


class SimilarityResponse(ResponseModel):
    """Both directions of retrieval."""

    object: Literal["similarity"] = "similarity"
    model: str
    texts: list[Ranking] = Field(description="For each text, the images.")
    images: list[Ranking] = Field(description="For each image, the texts.")
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
    async def classify(request: Request) -> PydanticResponse:
        """Score labels for one or many images.

        Scores are probabilities, and independent of each other unless softmax is asked. They run low: 0.1 to 0.5 is
        usual for a right label.
        """
        context = context_of(request)
        question, model, sources, images, params = await _read_classify(request, service.config.limits)
        service.check_model(model)
        if sources:
            images = await service.image_reader.read(sources, params, context)
        asked = await service.label_sets.find(question, context)
        vectors = await service.embedder.embed_images(images, params, context)
        return PydanticResponse(
            ClassifyResponse(
                model=service.name,
                label_set=question.label_set,
                data=[
                    Classification(index=index, labels=row)
                    for index, row in enumerate(score_labels(vectors, asked, question))
                ],
                usage=service.usage(context),
                fingerprint=service.fingerprint(asked.digest),
            )
        )

    @app.post(
        "/v1/similarity", response_model=SimilarityResponse, responses=documented(400, 404), tags=["classification"]
    )
    async def compare(body: SimilarityRequest, request: Request) -> PydanticResponse:
        """Rank images for each text and texts for each image: retrieval, both ways. Texts are taken as they are."""
        context = context_of(request)
        service.check_model(body.model)
        params = [f"images.{n}" for n in range(len(body.images))]
        data = await service.image_reader.read(body.images, params, context)
        texts = await service.embedder.embed_texts(body.texts, [f"texts.{n}" for n in range(len(body.texts))], context)
        images = await service.embedder.embed_images(data, params, context)
        cosines = texts @ images.T
        scores = sigmoid(score_pairs(texts, images, service.about.scale))
        return PydanticResponse(
            SimilarityResponse(
                model=service.name,
                texts=rank_pairs(cosines, scores, body.top_k),
                images=rank_pairs(cosines.T, scores.T, body.top_k),
                usage=service.usage(context),
                fingerprint=service.fingerprint(),
            )
        )

    @app.get("/v1/label-sets", response_model=LabelSetList, responses=documented(), tags=["classification"])
    async def list_label_sets() -> PydanticResponse:
        """The label sets that were registered when the server started, and are embedded already."""
        return PydanticResponse(
            LabelSetList(
                data=[
                    LabelSetCard(
                        id=name,
                        labels=question.names,
                        templates=list(question.labels.templates),
                        threshold=question.labels.threshold,
                        top_k=question.labels.top_k,
                        fingerprint=service.fingerprint(question.digest),
                    )
                    for name, question in service.label_sets.registered.items()
                ]
            )
        )


def rank_pairs(cosines: Floats, scores: Floats, top_k: int | None) -> list[Ranking]:
    """Rows of cosines (Q, C) and scores to each row's best columns, best first; ties keep their order."""
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :top_k]
    return [
        Ranking(
            index=row,
            matches=[
                Match(index=int(column), cosine=float(cosines[row, column]), score=float(scores[row, column]))
                for column in columns
            ],
        )
        for row, columns in enumerate(order)
    ]


Parsed = tuple[LabelQuery, str | None, list[str], list[bytes], list[str]]
"""The question, the model's name, images as strings or as bytes, and the fields that these came from."""


async def _read_classify(request: Request, limits: EndpointLimits) -> Parsed:
    """A request's body, JSON, an image or a form. Raises `ApiError`."""
    found = await read_uploads(request, limits)
    if found is not None:
        return _read_fields(*found)
    body = await read_json(request, ClassifyRequest, ANY_IMAGE, "multipart/form-data")
    if (body.image is None) == (body.images is None):
        raise ApiError("invalid_request", "give exactly one of image and images", param="image")
    if body.image is not None:
        return body, body.model, [body.image], [], ["image"]
    sources = list(body.images or ())
    return body, body.model, sources, [], [f"images.{n}" for n in range(len(sources))]


def _read_fields(images: list[bytes], given: FormData | QueryParams) -> Parsed:
    """Images, and what stands beside them as it stands in JSON. Numbers stay strings, which pydantic reads."""
    fields: dict[str, Any] = {}
    for name in given:
        values = given.getlist(name)
        fields[name] = values if name in _MANY else values[-1]
    model = fields.pop("model", None)
    try:
        question = LabelQuery.model_validate(fields)
    except ValidationError as error:
        raise describe_validation(error.errors()) from None
    return question, str(model) if model else None, [], images, [f"image.{n}" for n in range(len(images))]
