"""`POST /`: what `huggingface_hub.InferenceClient(model=URL)` and the Inference API's other clients send.

`POST /embed`, `GET /info`: Text Embeddings Inference.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from pydantic import ConfigDict, Field, RootModel

from serve.context import RequestContext
from serve.http.errors import ApiError
from serve.http.json_body import read_json
from serve.http.responses import IMAGE_BODY, PydanticResponse, body_of, context_of, documented
from serve.http.uploads import ANY_IMAGE, read_uploads
from serve.label_sets.scoring import score_labels
from serve.schemas import PIXEL, LabelQuery, Labels, LabelScore, Lenient, ResponseModel, Strings
from serve.service import Service
from siglip.labels import DEFAULT_TEMPLATE


class HuggingFaceParameters(Lenient):
    """Of zero-shot image classification."""

    candidate_labels: Labels | str | None = Field(None, description="A list, or names with commas between them.")
    hypothesis_template: str | None = None

    def labels(self) -> list[str] | None:
        """The candidates one by one; None if there are none, which asks for embeddings."""
        given = self.candidate_labels
        return [name.strip() for name in given.split(",") if name.strip()] if isinstance(given, str) else given


class HuggingFaceRequest(Lenient):
    """With candidate_labels, `inputs` is an image; without, it is one text or several to embed."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": PIXEL, "parameters": {"candidate_labels": ["red square", "blue circle"]}},
                {"inputs": ["a red square", "a blue circle"]},
            ]
        }
    )

    inputs: str | Strings
    parameters: HuggingFaceParameters | None = None
    normalize: bool | None = Field(None, description="Embeddings always have unit norm: false is refused.")
    dimensions: int | None = None


class TeiRequest(Lenient):
    """Text Embeddings Inference's: texts to embed. Texts beyond the model's length are always cut."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": ["a red square", "a blue circle"]}]})

    inputs: str | Strings
    normalize: bool | None = Field(None, description="Embeddings always have unit norm: false is refused.")
    dimensions: int | None = None


class TeiInfo(ResponseModel):
    """What Text Embeddings Inference tells of itself."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_type: dict[str, Any]
    max_input_length: int
    max_client_batch_size: int
    max_concurrent_requests: int
    version: str


class Scores(RootModel[list[LabelScore]]):
    """An image's labels, best first."""


class Vectors(RootModel[list[list[float]]]):
    """Embeddings of unit norm."""


class HuggingFaceResponse(RootModel[list[LabelScore] | list[list[float]]]):
    """Scores for an image with labels, embeddings for texts, or for an image without."""


def add_huggingface_routes(app: FastAPI, service: Service) -> None:
    """Register the routes."""

    @app.post(
        "/",
        response_model=HuggingFaceResponse,
        responses=documented(400),
        openapi_extra=body_of(HuggingFaceRequest, **{ANY_IMAGE: IMAGE_BODY}),
        tags=["other clients"],
    )
    async def infer(request: Request) -> PydanticResponse:
        """What `huggingface_hub.InferenceClient(model=URL)` sends.

        `zero_shot_image_classification` gives every label's score, `feature_extraction` embeddings. The body may be an
        image itself: `candidate_labels` and `hypothesis_template` are in the query then.
        """
        context = context_of(request)
        found = await read_uploads(request, service.config.limits)
        if found is not None:
            [image, *others], fields = found
            if others:
                raise ApiError("unsupported_input", "one image at a time", param="image")
            asked = HuggingFaceParameters.model_validate({name: str(value) for name, value in fields.items()})
            return await classify(image, "image", asked, context)
        body = await read_json(request, HuggingFaceRequest, ANY_IMAGE)
        check_shape(service, body)
        parameters = body.parameters or HuggingFaceParameters()
        if parameters.labels() is None:
            return await embed_texts(body.inputs, context)
        if not isinstance(body.inputs, str):
            raise ApiError("unsupported_input", "inputs: one image with candidate_labels, not a list", param="inputs")
        [image] = await service.image_reader.read([body.inputs], ["inputs"], context)
        return await classify(image, "inputs", parameters, context)

    @app.post("/embed", response_model=Vectors, responses=documented(400), tags=["other clients"])
    async def embed(body: TeiRequest, request: Request) -> PydanticResponse:
        """What clients of Text Embeddings Inference send."""
        check_shape(service, body)
        return await embed_texts(body.inputs, context_of(request))

    @app.get("/info", response_model=TeiInfo, responses=documented(), tags=["other clients"])
    async def describe() -> PydanticResponse:
        """What clients of Text Embeddings Inference ask first."""
        about, limits = service.about, service.config.limits
        return PydanticResponse(
            TeiInfo(
                model_id=service.name,
                model_sha=about.weights,
                model_dtype=about.dtype,
                model_type={"embedding": {"pooling": "last_token"}},
                max_input_length=about.text_length,
                max_client_batch_size=limits.texts,
                max_concurrent_requests=limits.in_flight,
                version=version("sightline"),
            )
        )

    async def embed_texts(inputs: str | list[str], context: RequestContext) -> PydanticResponse:
        texts = [inputs] if isinstance(inputs, str) else inputs
        if not texts:
            raise ApiError("invalid_request", "inputs: nothing to embed", param="inputs")
        vectors = await service.embedder.embed_texts(texts, [f"inputs.{n}" for n in range(len(texts))], context)
        return PydanticResponse(Vectors(vectors.tolist()))

    async def classify(
        image: bytes, param: str, asked: HuggingFaceParameters, context: RequestContext
    ) -> PydanticResponse:
        """An image's scores, or without labels its embedding."""
        labels = asked.labels()
        if labels is None:
            return PydanticResponse(Vectors((await service.embedder.embed_images([image], [param], context)).tolist()))
        if not labels:
            raise ApiError("invalid_request", "candidate_labels: no label in it", param="parameters.candidate_labels")
        question = LabelQuery(labels=labels, templates=[asked.hypothesis_template or DEFAULT_TEMPLATE])
        found = await service.label_sets.find(question, context)
        [row] = score_labels(await service.embedder.embed_images([image], [param], context), found, question)
        return PydanticResponse(Scores(row))


def check_shape(service: Service, body: HuggingFaceRequest | TeiRequest) -> None:
    """Raises `ApiError` when embeddings are wanted as they are not."""
    service.check_dimensions(body.dimensions, "dimensions")
    if body.normalize is False:
        raise ApiError("invalid_request", "normalize: embeddings always have unit norm", param="normalize")
