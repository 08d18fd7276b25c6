"""Cohere's API, `POST /v2/embed`: the requests of `cohere.ClientV2(base_url=URL).embed`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from serve.http.errors import ApiError
from serve.http.json_response import LongList, make_response
from serve.http.responses import context_of, documented
from serve.routes.inputs import EmbeddingInput, embed_inputs, encode_vector, read_image_url
from serve.schemas import BOUNDED, EXAMPLE_PNG, Fingerprint, ImageUrl, Lenient, ResponseModel, Strings
from serve.service import Service
from siglip.scoring import Floats

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]


class CohereContent(Lenient):
    """The text or the image of an input."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class CohereInput(Lenient):
    """One text or one image to embed."""

    content: Annotated[list[CohereContent], BOUNDED]


class CohereRequest(Lenient):
    """Texts and images to embed. Exactly one of texts, images and inputs."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "tiny", "input_type": "image", "images": [f"data:image/png;base64,{EXAMPLE_PNG}"]},
                {"model": "tiny", "input_type": "search_query", "texts": ["a red square"]},
            ]
        }
    )

    model: str
    input_type: str | None = None
    texts: Strings | None = None
    images: Strings | None = None
    inputs: Annotated[list[CohereInput], BOUNDED] | None = None
    embedding_types: Annotated[list[EmbeddingType], BOUNDED] = Field(
        ["float"],
        min_length=1,
        description="float and base64 are float32. int8 and uint8 scale each vector by its largest component, so only "
        "cosines of them are meaningful. binary and ubinary have one bit for each component: whether it is positive.",
    )
    output_dimension: int | None = None


class CohereResponse(ResponseModel):
    """The embeddings by type, in the order of the request."""

    response_type: Literal["embeddings_by_type"] = "embeddings_by_type"
    id: str
    embeddings: dict[str, Any]
    texts: list[str]
    meta: dict[str, Any]
    fingerprint: Fingerprint


def add_cohere_routes(app: FastAPI, service: Service) -> None:
    """Register the routes."""

    @app.post("/v2/embed", response_model=CohereResponse, responses=documented(400, 404), tags=["other clients"])
    async def embed(body: CohereRequest, request: Request) -> Response:
        """Embed texts or images for `cohere.ClientV2(base_url=URL).embed`.

        `input_type` and `truncate` have no effect, because SigLIP has no such settings.
        """
        context = context_of(request)
        service.check_model(body.model)
        service.check_dimensions(body.output_dimension, "output_dimension")
        vectors = await embed_inputs(_list_inputs(body), service, context)
        embeddings = {
            kind: LongList(len(vectors), vectors.shape[1], partial(encode_rows, vectors, kind))
            for kind in dict.fromkeys(body.embedding_types)
        }
        usage = service.usage(context)
        content = {
            "response_type": "embeddings_by_type",
            "id": context.request_id,
            "embeddings": embeddings,
            "texts": body.texts or [],
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"input_tokens": usage.prompt_tokens, "images": usage.images},
            },
            "fingerprint": service.fingerprint().model_dump(),
        }
        return await make_response(content, service, context)


def encode_vectors(vectors: Floats, kind: EmbeddingType) -> list[Any]:
    """Encode embeddings (N, D) as Cohere's embedding type `kind`: a list with one row for each embedding.

    * `float`: the components. `base64`: little-endian float32.
    * `int8`: each vector is scaled so that the absolute value of its largest component is 127. Without scaling, the
      small components of a unit vector (768 of them) would all round to a few levels. Cosines stay the same up to
      rounding; lengths are lost. `uint8` is `int8` plus 128.
    * `ubinary`: one bit for each component, set if it is positive. Eight components make a number from 0 to 255, with
      the first component in the highest bit. `binary` is `ubinary` minus 128. D must be a multiple of eight, as
      SigLIP's is.
    """
    if kind == "float":
        return list(vectors)
    if kind == "base64":
        return [encode_vector(vector) for vector in vectors]
    if kind in ("int8", "uint8"):
        largest = np.abs(vectors).max(axis=1, keepdims=True, initial=1e-12)
        levels = np.rint(vectors / largest * 127).astype(np.int32)
        return list(levels + 128 * (kind == "uint8"))
    bits = np.packbits(vectors > 0, axis=1).astype(np.int32)
    return list(bits - 128 * (kind == "binary"))


def encode_rows(vectors: Floats, kind: EmbeddingType, start: int, stop: int) -> list[Any]:
    """Encode the embeddings from `start` to `stop`: see `encode_vectors`."""
    return encode_vectors(vectors[start:stop], kind)


def _list_inputs(body: CohereRequest) -> list[EmbeddingInput]:
    """The inputs of a request, in order. Raises `ApiError`."""
    given = [name for name in ("texts", "images", "inputs") if getattr(body, name)]
    if len(given) != 1:
        raise ApiError("invalid_request", "give exactly one of texts, images and inputs", param="texts")
    if body.texts:
        return [EmbeddingInput("text", text, f"texts.{n}") for n, text in enumerate(body.texts)]
    if body.images:
        return [EmbeddingInput("image", image, f"images.{n}") for n, image in enumerate(body.images)]
    return [_read_input(item, f"inputs.{n}") for n, item in enumerate(body.inputs or ())]


def _read_input(item: CohereInput, param: str) -> EmbeddingInput:
    if len(item.content) != 1:
        raise ApiError(
            "unsupported_input",
            f"{param}: {len(item.content)} parts; send one text or one image per input: SigLIP has no joint embedding",
            param=param,
        )
    [part] = item.content
    if part.type == "image_url":
        return read_image_url(part.image_url, param)
    return EmbeddingInput("text", part.text or "", param)
