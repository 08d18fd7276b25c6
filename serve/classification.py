"""`POST /v1/classify`, `POST /v1/similarity`, `GET /v1/label-sets`: Sightline's own shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from serve.answers import Reply, documented, trace_of
from serve.bodies import form_parts, parse
from serve.config import EndpointLimits
from serve.errors import ApiError
from serve.schemas import (
    Classification,
    ClassifyAnswer,
    ClassifyRequest,
    LabelQuestion,
    LabelScore,
    LabelSetCard,
    LabelSetList,
    Match,
    Ranking,
    SimilarityAnswer,
    SimilarityRequest,
)
from serve.service import Service
from serve.validation import describe_validation
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


def add_classification_routes(app: FastAPI, service: Service) -> None:
    """Register the routes."""
    body_schema = {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": ClassifyRequest.model_json_schema()},
                "multipart/form-data": {"schema": _FORM_SCHEMA},
            },
        }
    }

    @app.post(
        "/v1/classify",
        response_model=ClassifyAnswer,
        responses=documented(400, 404),
        openapi_extra=body_schema,
        tags=["classification"],
    )
    async def classify(request: Request) -> Reply:
        """Score labels for one or many images.

        Scores are probabilities, and independent of each other unless softmax is asked. They run low: 0.1 to 0.5 is
        usual for a right label.
        """
        trace = trace_of(request)
        question, model, sources, images, params = await _read_classify(request, service.config.limits)
        service.check_model(model)
        if sources:
            images = await service.read_images(sources, params, trace)
        asked = await service.ask(question, trace)
        vectors = await service.embed_images(images, params, trace)
        return Reply(
            ClassifyAnswer(
                model=service.name,
                label_set=question.label_set,
                data=[
                    Classification(index=index, labels=[LabelScore(label=name, score=score) for name, score in row])
                    for index, row in enumerate(service.classify(vectors, asked, question))
                ],
                usage=service.usage(trace),
                fingerprint=service.fingerprint(asked.digest),
            )
        )

    @app.post(
        "/v1/similarity", response_model=SimilarityAnswer, responses=documented(400, 404), tags=["classification"]
    )
    async def compare(body: SimilarityRequest, request: Request) -> Reply:
        """Rank images for each text and texts for each image: retrieval, both ways. Texts are taken as they are."""
        trace = trace_of(request)
        service.check_model(body.model)
        params = [f"images.{n}" for n in range(len(body.images))]
        data = await service.read_images(body.images, params, trace)
        texts = await service.embed_texts(body.texts, [f"texts.{n}" for n in range(len(body.texts))], trace)
        images = await service.embed_images(data, params, trace)
        cosines = texts @ images.T
        scores = sigmoid(score_pairs(texts, images, service.about.scale))
        return Reply(
            SimilarityAnswer(
                model=service.name,
                texts=rank_pairs(cosines, scores, body.top_k),
                images=rank_pairs(cosines.T, scores.T, body.top_k),
                usage=service.usage(trace),
                fingerprint=service.fingerprint(),
            )
        )

    @app.get("/v1/label-sets", response_model=LabelSetList, responses=documented(), tags=["classification"])
    async def list_label_sets() -> Reply:
        """The label sets that were registered when the server started, and are embedded already."""
        return Reply(
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
                    for name, question in service.questions.items()
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


Parsed = tuple[LabelQuestion, str | None, list[str], list[bytes], list[str]]
"""The question, the model's name, images as strings or as bytes, and the fields that these came from."""


async def _read_classify(request: Request, limits: EndpointLimits) -> Parsed:
    """A request's body, JSON or multipart. Raises `ApiError`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "multipart/form-data":
            return await _read_form(request, limits)
        if kind == "application/json" or kind.endswith("+json"):
            body = await parse(ClassifyRequest.model_validate_json, await request.body())
        else:
            raise ApiError("unsupported_media_type", f"send application/json or multipart/form-data, not {kind!r}")
    except ValidationError as error:
        raise describe_validation(error.errors()) from None
    if (body.image is None) == (body.images is None):
        raise ApiError("invalid_request", "give exactly one of image and images", param="image")
    if body.image is not None:
        return body, body.model, [body.image], [], ["image"]
    sources = list(body.images or ())
    return body, body.model, sources, [], [f"images.{n}" for n in range(len(sources))]


async def _read_form(request: Request, limits: EndpointLimits) -> Parsed:
    # How many there may be is for the limits to say, which `serve.bodies` has seen to.
    most = form_parts(limits)
    async with request.form(max_files=most, max_fields=most, max_part_size=limits.body_bytes) as form:
        model = form.get("model")
        fields = _form_fields(form)
        files = form.getlist("image") + form.getlist("images")
        if not files or not all(isinstance(file, UploadFile) for file in files):
            raise ApiError("invalid_request", "image: send at least one file, such as -F image=@cat.jpg", param="image")
        images = [await file.read() for file in files if isinstance(file, UploadFile)]
    question = LabelQuestion.model_validate(fields)
    return question, str(model) if model else None, [], images, [f"image.{n}" for n in range(len(images))]


def _form_fields(form: FormData) -> dict[str, Any]:
    """The fields of a form that are no files, as they stand in JSON. Numbers stay strings, which pydantic reads."""
    fields: dict[str, Any] = {}
    for name in form:
        if name in ("image", "images", "model"):
            continue
        values = form.getlist(name)
        if any(isinstance(value, UploadFile) for value in values):
            raise ApiError("invalid_request", f"{name}: a file where a value belongs", param=name)
        fields[name] = values if name in _MANY else values[-1]
    return fields
