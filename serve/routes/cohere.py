"""Cohere's API: `POST /v2/embed` for `cohere.ClientV2(base_url=URL)`, and `POST /v1/embed` for `cohere.Client`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from serve.context import RequestContext
from serve.embedding.vector_encoding import NumberType, VectorEncoding
from serve.http.errors import ApiError
from serve.http.json_response import LongList, make_response
from serve.http.responses import context_of, documented
from serve.options.reading import read_embedding_options
from serve.options.table import EMBEDDING_OPTIONS, schema_of
from serve.routes.inputs import (
    MODALITY_HELP,
    EmbeddingInput,
    Modality,
    check_part,
    embed_inputs,
    list_vectors,
    read_image_url,
    read_text,
)
from serve.schemas import BOUNDED, EXAMPLE_PNG, Fingerprint, ImageUrl, Lenient, ResponseModel, Strings, VendorRequest
from serve.service import Service
from siglip.scoring import Floats

EmbeddingType = NumberType | Literal["base64"]
EmbeddingTypes = Annotated[list[EmbeddingType], BOUNDED, Field(min_length=1)]
TYPES_HELP = (
    "float and base64 are float32. int8 and uint8 scale each vector by its largest component, so only cosines of them "
    "are meaningful. binary and ubinary have one bit for each component: whether it is positive."
)


class CohereContent(Lenient):
    """The text or the image of an input."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class CohereInput(Lenient):
    """One text or one image to embed."""

    content: Annotated[list[CohereContent], BOUNDED]


def _add_options(schema: dict[str, Any]) -> None:
    schema_of(EMBEDDING_OPTIONS)(schema)
    schema["examples"] = [
        {"model": "tiny", "input_type": "image", "images": [f"data:image/png;base64,{EXAMPLE_PNG}"]},
        {"model": "tiny", "input_type": "search_query", "texts": ["a red square"]},
    ]


class CohereInputs(VendorRequest):
    """Texts and images to embed. Exactly one of texts, images and inputs."""

    model_config = ConfigDict(json_schema_extra=_add_options)

    texts: Strings | None = None
    images: Strings | None = None
    inputs: Annotated[list[CohereInput], BOUNDED] | None = None
    modality: Modality = Field("auto", description=MODALITY_HELP)


class CohereRequest(CohereInputs):
    """A request of version 2."""

    model: str
    embedding_types: EmbeddingTypes = Field(["float"], description=TYPES_HELP)


class CohereV1Request(CohereInputs):
    """A request of version 1. Without embedding_types the response has lists of floats."""

    model: str | None = None
    embedding_types: EmbeddingTypes | None = Field(None, description=TYPES_HELP)


class CohereResponse(ResponseModel):
    """The embeddings in the order of the request: by type, or as lists of floats."""

    response_type: Literal["embeddings_by_type", "embeddings_floats"]
    id: str
    embeddings: dict[str, Any] | list[Any]
    texts: list[str]
    meta: dict[str, Any]
    fingerprint: Fingerprint


def add_cohere_routes(app: FastAPI, service: Service) -> None:
    """Register the routes."""

    @app.post("/v2/embed", response_model=CohereResponse, responses=documented(400, 404), tags=["other clients"])
    async def embed(body: CohereRequest, request: Request) -> Response:
        """Embed texts or images for `cohere.ClientV2(base_url=URL).embed`."""
        return await respond(body, body.model, body.embedding_types, "2", context_of(request))

    @app.post("/v1/embed", response_model=CohereResponse, responses=documented(400, 404), tags=["other clients"])
    async def embed_v1(body: CohereV1Request, request: Request) -> Response:
        """Embed texts or images for `cohere.Client(base_url=URL).embed`."""
        return await respond(body, body.model, body.embedding_types, "1", context_of(request))

    async def respond(
        body: CohereInputs,
        model: str | None,
        types: Sequence[EmbeddingType] | None,
        api_version: str,
        context: RequestContext,
    ) -> Response:
        service.check_model(model)
        choices = read_embedding_options(body.options(), service, known=type(body).model_fields)
        vectors = await embed_inputs(
            _list_inputs(body), service, context, choices.truncation(service.about.text_length)
        )
        usage = service.usage(context)
        by_type = {
            kind: LongList(len(vectors), vectors.shape[1], partial(encode_rows, vectors, kind))
            for kind in dict.fromkeys(types or ())
        }
        content = {
            "response_type": "embeddings_floats" if types is None else "embeddings_by_type",
            "id": context.request_id,
            "embeddings": list_vectors(vectors) if types is None else by_type,
            "texts": list_texts(body.texts or []),
            "meta": {
                "api_version": {"version": api_version},
                "billed_units": {"input_tokens": usage.prompt_tokens, "images": usage.images},
            },
            "fingerprint": service.fingerprint().model_dump(),
        }
        return await make_response(content, service, context)


def encode_vectors(vectors: Floats, kind: EmbeddingType) -> list[Any]:
    """Encode embeddings (N, D) as Cohere's embedding type `kind`: a list with one row for each embedding."""
    encoding = VectorEncoding(as_base64=True) if kind == "base64" else VectorEncoding(kind)
    return encoding.encode(vectors)


def encode_rows(vectors: Floats, kind: EmbeddingType, start: int, stop: int) -> list[Any]:
    """Encode the embeddings from `start` to `stop`: see `encode_vectors`."""
    return encode_vectors(vectors[start:stop], kind)


def _list_inputs(body: CohereInputs) -> list[EmbeddingInput]:
    """The inputs of a request, in order. Raises `ApiError`."""
    given = [name for name in ("texts", "images", "inputs") if getattr(body, name)]
    if len(given) != 1:
        raise ApiError("invalid_request", "give exactly one of texts, images and inputs", param="texts")
    if body.texts:
        return [
            read_text(text, f"texts.{n}", body.modality, instead="send it in images")
            for n, text in enumerate(body.texts)
        ]
    if body.images:
        return [EmbeddingInput("image", image, f"images.{n}") for n, image in enumerate(body.images)]
    return [_read_input(item, f"inputs.{n}", body.modality) for n, item in enumerate(body.inputs or ())]


def _read_input(item: CohereInput, param: str, modality: Modality) -> EmbeddingInput:
    if len(item.content) != 1:
        raise ApiError(
            "unsupported_input",
            f"{param}: {len(item.content)} parts; send one text or one image per input: SigLIP has no joint embedding",
            param=param,
        )
    [part] = item.content
    check_part(part.type, part.text, part.image_url, param)
    if part.type == "image_url":
        return read_image_url(part.image_url, param)
    return read_text(part.text or "", param, modality, instead="send it as a part of type image_url")


def list_texts(texts: Sequence[str]) -> LongList:
    """Texts as a JSON list. Eight characters take about as long to write as a number."""
    numbers = sum(map(len, texts)) // (8 * max(1, len(texts))) + 1
    return LongList(len(texts), numbers, lambda start, stop: list(texts[start:stop]))
