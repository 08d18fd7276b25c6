"""`POST /v1/embeddings`, `GET /v1/models`: OpenAI's shapes, with images beside texts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from fastapi import FastAPI, Request

from serve.answers import Reply, documented, trace_of
from serve.errors import ApiError
from serve.inputs import is_data_uri
from serve.schemas import (
    ContentPart,
    EmbeddingAnswer,
    EmbeddingItem,
    EmbeddingRequest,
    ImagePart,
    ImageUrl,
    Message,
    ModelCard,
    ModelList,
    TextPart,
)
from serve.service import Service, Trace
from siglip.scoring import Floats


@dataclass(frozen=True)
class Source:
    """One thing to embed: a text, or an image in a string. `param` is the field that it came from."""

    kind: Literal["text", "image"]
    value: str
    param: str


def add_embedding_routes(app: FastAPI, service: Service) -> None:
    """Register the routes."""

    @app.post(
        "/v1/embeddings", response_model=EmbeddingAnswer, responses=documented(400, 404, 413), tags=["embeddings"]
    )
    async def create_embeddings(body: EmbeddingRequest, request: Request) -> Reply:
        """Embed texts and images into one space, with unit norm: their dot product is their cosine."""
        trace = trace_of(request)
        service.check_model(body.model)
        service.check_width(body.dimensions, "dimensions")
        vectors = await embed_sources(list_sources(body), service, trace)
        as_base64 = body.encoding_format == "base64"
        return Reply(
            EmbeddingAnswer(
                model=service.name,
                data=[
                    EmbeddingItem(index=index, embedding=encode_vector(vector) if as_base64 else vector.tolist())
                    for index, vector in enumerate(vectors)
                ],
                usage=service.usage(trace),
                fingerprint=service.fingerprint(),
            )
        )

    @app.get("/v1/models", response_model=ModelList, responses=documented(), tags=["models"])
    async def list_models() -> Reply:
        """The model that this server runs."""
        return Reply(ModelList(data=[make_card(service)]))

    @app.get("/v1/models/{id:path}", response_model=ModelCard, responses=documented(404), tags=["models"])
    async def retrieve_model(id: str) -> Reply:
        """One model. Its id may hold slashes."""
        service.check_model(id)
        return Reply(make_card(service))


def make_card(service: Service) -> ModelCard:
    """What clients can know of the model."""
    about = service.about
    return ModelCard(
        id=service.name,
        created=about.loaded,
        dimensions=about.width,
        image_size=about.spec.size,
        text_length=about.text_length,
        device=about.device,
        dtype=about.dtype,
        fingerprint=service.fingerprint(),
    )


async def embed_sources(sources: Sequence[Source], service: Service, trace: Trace) -> Floats:
    """Embeddings of a mixture, in its order: float32 (N, D)."""
    images = [n for n, source in enumerate(sources) if source.kind == "image"]
    texts = [n for n, source in enumerate(sources) if source.kind == "text"]
    vectors = np.zeros((len(sources), service.about.width), np.float32)
    if texts:
        params = [sources[n].param for n in texts]
        vectors[texts] = await service.embed_texts([sources[n].value for n in texts], params, trace)
    if images:
        params = [sources[n].param for n in images]
        data = await service.read_images([sources[n].value for n in images], params, trace)
        vectors[images] = await service.embed_images(data, params, trace)
    return vectors


def list_sources(body: EmbeddingRequest) -> list[Source]:
    """What a request wants embedded, in order. Raises `ApiError`."""
    if (body.input is None) == (body.messages is None):
        raise ApiError("invalid_request", "give exactly one of input and messages", param="input")
    if body.messages is not None:
        sources = [_read_message(message, f"messages.{n}") for n, message in enumerate(body.messages)]
    elif isinstance(body.input, list):
        sources = [_read_input(item, f"input.{n}", body.modality) for n, item in enumerate(body.input)]
    else:
        sources = [_read_input(body.input, "input", body.modality)]
    if not sources:
        raise ApiError("invalid_request", "nothing to embed: the list is empty", param="input")
    return sources


def encode_vector(vector: Floats) -> str:
    """Little-endian float32 in base64, as OpenAI's client asks for when its caller says nothing."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def read_image_url(url: ImageUrl | str | None, param: str) -> Source:
    """The image of a chat message's part."""
    if url is None:
        raise ApiError("invalid_request", f"{param}: an image_url part without image_url", param=param)
    return Source("image", url if isinstance(url, str) else url.url, param)


def _read_input(
    item: str | TextPart | ImagePart | int | list[int] | None, param: str, modality: Literal["auto", "text", "image"]
) -> Source:
    if isinstance(item, TextPart):
        return Source("text", item.text, param)
    if isinstance(item, ImagePart):
        return Source("image", item.image, param)
    if isinstance(item, str):
        is_image = modality == "image" or (modality == "auto" and is_data_uri(item))
        return Source("image" if is_image else "text", item, param)
    raise ApiError("unsupported_input", f"{param}: token ids are another model's; send the text", param=param)


def _read_message(message: Message, param: str) -> Source:
    """A message's one part that can be embedded. SigLIP has no embedding of a text and an image together."""
    if isinstance(message.content, str):
        return Source("text", message.content, param)
    parts: list[ContentPart] = [part for part in message.content if part.type == "image_url" or part.text]
    if len(parts) != 1:
        raise ApiError(
            "unsupported_input",
            f"{param}: {len(parts)} parts; each message is one text or one image, which SigLIP embeds separately",
            param=param,
        )
    if parts[0].type == "image_url":
        return read_image_url(parts[0].image_url, param)
    return Source("text", parts[0].text or "", param)
