"""Hugging Face's APIs.

* `POST /`: the Inference API, for clients such as `huggingface_hub.InferenceClient(model=URL)`.
* `POST /embed` and `GET /info`: Text Embeddings Inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from pydantic import ConfigDict, Field, RootModel
from starlette.responses import Response

from serve.context import RequestContext
from serve.http.bodies.json_body import read_json
from serve.http.bodies.uploads import ANY_IMAGE, read_uploads
from serve.http.errors import ApiError
from serve.http.json_response import make_response
from serve.http.responses import IMAGE_BODY, PydanticResponse, body_of, context_of, documented
from serve.label_sets.scoring import score_labels
from serve.options.choices import EmbeddingChoices, ScoreChoices
from serve.options.reading import read_embedding_options, read_score_options
from serve.options.table import EMBEDDING_OPTIONS, SCORE_OPTIONS, schema_of
from serve.routes.inputs import (
    MODALITY_HELP,
    EmbeddingInput,
    Modality,
    embed_classification,
    embed_inputs,
    list_vectors,
    read_string,
    refuse_images,
)
from serve.schemas import (
    EXAMPLE_PNG,
    IMAGE_HELP,
    LabelQuery,
    LabelScore,
    NonEmptyStrings,
    ResponseModel,
    Strict,
    Strings,
    VendorRequest,
)
from serve.service import Service
from siglip.labels import DEFAULT_TEMPLATE

LABELS_CHARACTERS = 300_000
"""Characters of labels in one string: more than a thousand labels of 256 characters have."""
MISPLACED_INSIDE = ("labels", "label_set", "templates", "activation")
"""Fields of other paths, which have no effect here."""
MISPLACED = (*MISPLACED_INSIDE, "hypothesis_template")
"""The same, and a field that has an effect within `parameters` only."""


class HuggingFaceParameters(VendorRequest):
    """The parameters of zero-shot image classification."""

    model_config = ConfigDict(json_schema_extra=schema_of(SCORE_OPTIONS))

    candidate_labels: NonEmptyStrings | str | None = Field(
        None, description="A list of labels, or labels separated by commas."
    )
    hypothesis_template: str | None = None

    @cached_property
    def labels(self) -> list[str] | None:
        """The list of candidate labels; None if the request has none, and so is a request for embeddings.

        Raises `ApiError` for a string that is too long.
        """
        given = self.candidate_labels
        if isinstance(given, str) and len(given) > LABELS_CHARACTERS:
            message = f"candidate_labels: {len(given)} characters in one string; send at most {LABELS_CHARACTERS}"
            raise ApiError("too_many_labels", message, param="parameters.candidate_labels")
        return [name.strip() for name in given.split(",") if name.strip()] if isinstance(given, str) else given


PARAMETERS = tuple(HuggingFaceParameters.model_fields)
"""The fields of `parameters` that are no options."""


class HuggingFaceImage(Strict):
    """An image, as Hugging Face's JavaScript client sends it. A text beside it is refused."""

    image: str = Field(description=IMAGE_HELP)


def _add_options(schema: dict[str, Any]) -> None:
    schema_of(EMBEDDING_OPTIONS)(schema)
    schema["examples"] = [
        {"inputs": EXAMPLE_PNG, "parameters": {"candidate_labels": ["red square", "blue circle"]}},
        {"inputs": ["a red square", "a blue circle"]},
    ]


class HuggingFaceRequest(VendorRequest):
    """An image to classify, if there are candidate_labels; otherwise texts and images to embed."""

    model_config = ConfigDict(json_schema_extra=_add_options)

    model: str | None = Field(None, description="An id of GET /v1/models. Optional.")
    inputs: str | HuggingFaceImage | Strings | None = Field(
        None, description=f"An image or texts; or a list, to embed. {MODALITY_HELP}"
    )
    image: str | None = Field(None, description=f"{IMAGE_HELP} Instead of inputs.")
    modality: Modality = Field("auto", description=MODALITY_HELP)
    parameters: HuggingFaceParameters = HuggingFaceParameters()


def _add_tei_options(schema: dict[str, Any]) -> None:
    schema_of(EMBEDDING_OPTIONS)(schema)
    schema["examples"] = [{"inputs": ["a red square", "a blue circle"]}]


class TeiRequest(VendorRequest):
    """Texts and images to embed. The end of a text that is longer than the model's input is cut off."""

    model_config = ConfigDict(json_schema_extra=_add_tei_options)

    model: str | None = Field(None, description="An id of GET /v1/models. Optional.")
    inputs: str | Strings
    modality: Modality = Field("auto", description=MODALITY_HELP)


class TeiInfo(ResponseModel):
    """The description of the server that Text Embeddings Inference has."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_type: dict[str, Any]
    max_input_length: int
    max_client_batch_size: int
    max_concurrent_requests: int
    auto_truncate: bool = True
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
        responses=documented(400, 404),
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
            service.check_model(str(fields.get("model") or "") or None)
            named = ("candidate_labels", "model")
            options = {name: value for name, value in fields.items() if value != "" and name not in named}
            labels = fields.getlist("candidate_labels")
            parameters = HuggingFaceParameters.model_validate(
                {**options, "candidate_labels": labels if len(labels) > 1 else next(iter(labels), None)}
            )
            refuse_misplaced({}, options)
            if "inputs" in options:
                raise ApiError("invalid_request", "inputs: the body is the image already", param="inputs")
            if parameters.labels is not None:
                scores = read_score_options(options, {}, (*HuggingFaceRequest.model_fields, *PARAMETERS), ())
                return await classify(EmbeddingInput("image", image, "image"), parameters, scores, context)
            check_template(parameters)
            choices = read_embedding_options(options, service, known=HuggingFaceRequest.model_fields)
            return await embed_all([EmbeddingInput("image", image, "image")], choices, context)
        body = await read_json(request, HuggingFaceRequest, ANY_IMAGE)
        service.check_model(body.model)
        inputs = _list_inputs(body)
        refuse_misplaced(body.options(), body.parameters.options())
        if body.parameters.labels is not None:
            if len(inputs) != 1 or isinstance(body.inputs, list):
                message = "inputs: one image with candidate_labels, not a list"
                raise ApiError("unsupported_input", message, param="inputs")
            image_input = EmbeddingInput("image", inputs[0].value, inputs[0].param)
            inner = body.parameters.options()
            scores = read_score_options(body.options(), inner, HuggingFaceRequest.model_fields, PARAMETERS)
            return await classify(image_input, body.parameters, scores, context)
        check_template(body.parameters)
        given = {**body.options(), "parameters": body.parameters.options()}
        choices = read_embedding_options(given, service, known=HuggingFaceRequest.model_fields)
        return await embed_all(inputs, choices, context)

    @app.post("/embed", response_model=Vectors, responses=documented(400, 404), tags=["other clients"])
    async def embed(body: TeiRequest, request: Request) -> Response:
        """Embed texts and images for clients of Text Embeddings Inference."""
        service.check_model(body.model)
        choices = read_embedding_options(body.options(), service, known=TeiRequest.model_fields)
        return await embed_all(_read_inputs(body.inputs, body.modality), choices, context_of(request))

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
                max_concurrent_requests=limits.requests,
                version=version("sightline"),
            )
        )

    async def embed_all(inputs: list[EmbeddingInput], choices: EmbeddingChoices, context: RequestContext) -> Response:
        vectors = await embed_inputs(inputs, service, context, choices.truncation(service.about.text_length))
        return await make_response(list_vectors(vectors), service, context)

    async def classify(
        image: EmbeddingInput, parameters: HuggingFaceParameters, choices: ScoreChoices, context: RequestContext
    ) -> Response:
        """The scores of an image."""
        query = _make_query(parameters, choices)
        [encoded] = (
            [image.value]
            if isinstance(image.value, bytes)
            else await service.image_reader.read([image.value], [image.param], context)
        )
        try:
            label_set, vectors = await embed_classification([encoded], [image.param], query, service, context)
        except ApiError as error:
            raise _rename_param(error) from None
        [scores] = (await score_labels(vectors, label_set, query, context)).labels
        return await make_response(scores, service, context)


_PARAMS = {"labels": "parameters.candidate_labels", "templates": "parameters.hypothesis_template"}
"""Hugging Face's names of the fields of a `LabelQuery`."""


def _rename_param(error: ApiError) -> ApiError:
    """The same error, with Hugging Face's name of the field in `param` and in the message."""
    name = _PARAMS.get(error.param or "")
    if name is None:
        return error
    message = error.message.replace(f"{error.param}: ", f"{name}: ", 1)
    return ApiError(error.code, message, status=error.status_code, param=name, retry_after=error.retry_after)


def refuse_misplaced(fields: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Refuse fields of other paths, which would have no effect here, and a template beside `parameters`.

    `fields` are those beside `parameters`, which this path reads its labels from. Raises `ApiError`.
    """
    places = [(name, name) for name in MISPLACED if fields.get(name) is not None]
    places += [(name, f"parameters.{name}") for name in MISPLACED_INSIDE if parameters.get(name) is not None]
    for name, param in places:
        message = (
            f"{name}: this path reads parameters.candidate_labels and parameters.hypothesis_template; /v1/classify has "
            "label sets and templates"
        )
        raise ApiError("invalid_request", message, param=param)


def check_template(parameters: HuggingFaceParameters) -> None:
    """Refuse a template without labels: it would have no effect. Raises `ApiError`."""
    if parameters.hypothesis_template is not None:
        message = "hypothesis_template: it needs candidate_labels"
        raise ApiError("invalid_request", message, param=_PARAMS["templates"])


def _make_query(parameters: HuggingFaceParameters, choices: ScoreChoices) -> LabelQuery:
    """The labels to score, and how. Raises `ApiError`."""
    labels = parameters.labels
    if not labels:
        raise ApiError("invalid_request", "candidate_labels: no label in the list", param=_PARAMS["labels"])
    refuse_images(labels, _PARAMS["labels"])
    return LabelQuery(
        labels=labels,
        templates=[parameters.hypothesis_template or DEFAULT_TEMPLATE],
        top_k=choices.top_k,
        threshold=choices.threshold,
        activation=choices.activation,
    )


def _list_inputs(body: HuggingFaceRequest) -> list[EmbeddingInput]:
    """The inputs of a request, in order. Raises `ApiError`."""
    if (body.inputs is None) == (body.image is None):
        raise ApiError("invalid_request", "give exactly one of inputs and image", param="inputs")
    if "candidate_labels" in body.options():
        message = "candidate_labels: put it into parameters"
        raise ApiError("invalid_request", message, param="candidate_labels")
    if body.image is not None:
        return [EmbeddingInput("image", body.image, "image")]
    if isinstance(body.inputs, HuggingFaceImage):
        return [EmbeddingInput("image", body.inputs.image, "inputs.image")]
    has_labels = body.parameters.labels is not None
    return _read_inputs(body.inputs or [], "image" if has_labels else body.modality)


def _read_inputs(inputs: str | list[str], modality: Modality) -> list[EmbeddingInput]:
    """Texts and images of `inputs`, in order. Raises `ApiError`."""
    if isinstance(inputs, str):
        return [read_string(inputs, "inputs", modality)]
    if not inputs:
        raise ApiError("invalid_request", "inputs: nothing to embed", param="inputs")
    return [read_string(item, f"inputs.{n}", modality) for n, item in enumerate(inputs)]
