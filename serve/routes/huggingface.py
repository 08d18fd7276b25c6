"""Hugging Face's APIs.

* `POST /`: the Inference API, for clients such as `huggingface_hub.InferenceClient(model=URL)`.
* `POST /embed` and `GET /info`: Text Embeddings Inference.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from pydantic import ConfigDict, Field, RootModel
from starlette.responses import Response

from serve.context import RequestContext
from serve.http.errors import ApiError
from serve.http.json_body import read_json
from serve.http.json_response import make_response
from serve.http.responses import IMAGE_BODY, PydanticResponse, body_of, context_of, documented
from serve.http.uploads import ANY_IMAGE, read_uploads
from serve.label_sets.scoring import score_labels
from serve.routes.inputs import EmbeddingInput, embed_classification, embed_inputs, list_vectors
from serve.schemas import EXAMPLE_PNG, LabelQuery, LabelScore, Lenient, NonEmptyStrings, ResponseModel, Strings
from serve.service import Service
from siglip.labels import DEFAULT_TEMPLATE


class HuggingFaceParameters(Lenient):
    """The parameters of zero-shot image classification."""

    candidate_labels: NonEmptyStrings | str | None = Field(
        None, description="A list of labels, or labels separated by commas."
    )
    hypothesis_template: str | None = None

    def labels(self) -> list[str] | None:
        """The list of candidate labels; None if the request has none, and so is a request for embeddings."""
        given = self.candidate_labels
        return [name.strip() for name in given.split(",") if name.strip()] if isinstance(given, str) else given


class HuggingFaceRequest(Lenient):
    """An image to classify, if there are candidate_labels; otherwise one text or several to embed."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": EXAMPLE_PNG, "parameters": {"candidate_labels": ["red square", "blue circle"]}},
                {"inputs": ["a red square", "a blue circle"]},
            ]
        }
    )

    inputs: str | Strings
    parameters: HuggingFaceParameters | None = None
    normalize: bool | None = Field(None, description="false is refused: embeddings always have unit norm.")
    dimensions: int | None = None


class TeiRequest(Lenient):
    """Texts to embed. A text that is longer than the model's input is always truncated."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": ["a red square", "a blue circle"]}]})

    inputs: str | Strings
    normalize: bool | None = Field(None, description="false is refused: embeddings always have unit norm.")
    dimensions: int | None = None


class TeiInfo(ResponseModel):
    """The description of the server that Text Embeddings Inference has."""

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
    """Scores of an image with labels; embeddings of texts, or of an image without labels."""


def add_huggingface_routes(app: FastAPI, service: Service) -> None:
    """Register the routes."""

    @app.post(
        "/",
        response_model=HuggingFaceResponse,
        responses=documented(400),
        openapi_extra=body_of(HuggingFaceRequest, **{ANY_IMAGE: IMAGE_BODY}),
        tags=["other clients"],
    )
    async def infer(request: Request) -> Response:
        """Classify an image or embed texts for `huggingface_hub.InferenceClient(model=URL)`.

        Its `zero_shot_image_classification` returns every label's score, its `feature_extraction` returns embeddings.
        The body may also be an image file, with `candidate_labels` and `hypothesis_template` in the query.
        """
        context = context_of(request)
        uploads = await read_uploads(request, service.config.limits)
        if uploads is not None:
            [image, *others], fields = uploads
            if others:
                raise ApiError("unsupported_input", "image: send one image at a time", param="image")
            parameters = HuggingFaceParameters.model_validate({name: str(value) for name, value in fields.items()})
            return await classify(image, "image", parameters, context)
        body = await read_json(request, HuggingFaceRequest, ANY_IMAGE)
        check_embedding_options(service, body)
        parameters = body.parameters or HuggingFaceParameters()
        if parameters.labels() is None:
            return await embed_texts(body.inputs, context)
        if not isinstance(body.inputs, str):
            raise ApiError("unsupported_input", "inputs: one image with candidate_labels, not a list", param="inputs")
        [image] = await service.image_reader.read([body.inputs], ["inputs"], context)
        return await classify(image, "inputs", parameters, context)

    @app.post("/embed", response_model=Vectors, responses=documented(400), tags=["other clients"])
    async def embed(body: TeiRequest, request: Request) -> Response:
        """Embed texts for clients of Text Embeddings Inference."""
        check_embedding_options(service, body)
        return await embed_texts(body.inputs, context_of(request))

    @app.get("/info", response_model=TeiInfo, responses=documented(), tags=["other clients"])
    async def describe() -> PydanticResponse:
        """Describe the server for clients of Text Embeddings Inference, which request this first."""
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

    async def embed_texts(inputs: str | list[str], context: RequestContext) -> Response:
        texts = [inputs] if isinstance(inputs, str) else inputs
        if not texts:
            raise ApiError("invalid_request", "inputs: nothing to embed", param="inputs")
        items = [EmbeddingInput("text", text, f"inputs.{n}") for n, text in enumerate(texts)]
        return await make_response(list_vectors(await embed_inputs(items, service, context)), service, context)

    async def classify(
        image: bytes, param: str, parameters: HuggingFaceParameters, context: RequestContext
    ) -> Response:
        """The scores of an image or, without labels, its embedding."""
        labels = parameters.labels()
        if labels is None:
            vectors = await embed_inputs([EmbeddingInput("image", image, param)], service, context)
            return await make_response(list_vectors(vectors), service, context)
        if not labels:
            raise ApiError(
                "invalid_request", "candidate_labels: no label in the list", param="parameters.candidate_labels"
            )
        query = LabelQuery(labels=labels, templates=[parameters.hypothesis_template or DEFAULT_TEMPLATE])
        label_set, vectors = await embed_classification([image], [param], query, service, context)
        [scores] = (await score_labels(vectors, label_set, query, service.worker, context)).labels
        return await make_response(scores, service, context)


def check_embedding_options(service: Service, body: HuggingFaceRequest | TeiRequest) -> None:
    """Raise `ApiError` if `dimensions` is not the model's embedding dimension, or `normalize` is false.

    Both may be absent. The model's embeddings have unit norm and cannot be shortened.
    """
    service.check_dimensions(body.dimensions, "dimensions")
    if body.normalize is False:
        raise ApiError("invalid_request", "normalize: embeddings always have unit norm", param="normalize")
