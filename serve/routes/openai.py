"""OpenAI's API: `POST /v1/embeddings`, for texts and images, and `GET /v1/models`.

Clients of vLLM and infinity use the same routes: vLLM's send `messages` instead of `input`, infinity's send
`modality: image` and paths without `/v1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import ConfigDict, Discriminator, Field, Tag
from starlette.responses import Response

from serve.fetch.images import is_data_uri
from serve.http.errors import ApiError
from serve.http.json_body import read_json
from serve.http.json_response import LongList, make_response
from serve.http.responses import IMAGE_BODY, PydanticResponse, body_of, context_of, documented
from serve.http.uploads import ANY_IMAGE, read_uploads
from serve.routes.inputs import EmbeddingInput, embed_inputs, encode_vector, read_image_url
from serve.schemas import BOUNDED, EXAMPLE_PNG, IMAGE_HELP, Fingerprint, ImageUrl, Lenient, ResponseModel, Usage
from serve.service import Service
from serve.tokens import TokenVocabulary

_FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["image"],
    "properties": {
        "image": {"type": "array", "items": IMAGE_BODY, "minItems": 1},
        "model": {"type": "string"},
        "encoding_format": {"type": "string", "enum": ["float", "base64"]},
    },
}
"""The schema of a multipart body: image files, and the format of the response."""


class TextPart(Lenient):
    """A text to embed."""

    text: str


class ImagePart(Lenient):
    """An image to embed."""

    image: str = Field(description=IMAGE_HELP)


class ContentPart(Lenient):
    """A part of a chat message."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | str | None = None


class Message(Lenient):
    """A message of a conversation, as vLLM's embedding endpoint reads it."""

    role: str = "user"
    content: str | Annotated[list[ContentPart], BOUNDED]


def _tag_input(value: Any) -> str:
    """The tag of a value's kind of input, so that pydantic validates it against this kind only."""
    if isinstance(value, dict):
        return "TextPart" if "text" in value else "ImagePart"
    if isinstance(value, list):
        return "Tokens"
    return "Token" if isinstance(value, int) else "Text"


OneInput = Annotated[
    Annotated[str, Tag("Text")]
    | Annotated[TextPart, Tag("TextPart")]
    | Annotated[ImagePart, Tag("ImagePart")]
    | Annotated[int, Tag("Token")]
    | Annotated[list[int], BOUNDED, Tag("Tokens")],
    Discriminator(_tag_input),
]
Inputs = Annotated[list[OneInput], BOUNDED]


def _tag_inputs(value: Any) -> str:
    return "List" if isinstance(value, list) else _tag_input(value)


class EmbeddingRequest(Lenient):
    """Texts and images to embed. Exactly one of `input` and `messages`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "tiny", "input": ["a photo of a red circle", f"data:image/png;base64,{EXAMPLE_PNG}"]},
                {
                    "model": "tiny",
                    "input": [{"text": "a red circle"}, {"image": EXAMPLE_PNG}],
                    "encoding_format": "float",
                },
            ]
        }
    )

    model: str = Field(description="An id of GET /v1/models.")
    input: (
        Annotated[
            Annotated[str, Tag("Text")]
            | Annotated[TextPart, Tag("TextPart")]
            | Annotated[ImagePart, Tag("ImagePart")]
            | Annotated[int, Tag("Token")]
            | Annotated[Inputs, Tag("List")],
            Discriminator(_tag_inputs),
        ]
        | None
    ) = Field(None, description="A text, the data: URI of an image, {text} or {image}; or a list of these.")
    messages: Annotated[list[Message], BOUNDED] | None = Field(
        None,
        description="A conversation, instead of input. Its one image or, without an image, its joined texts make one "
        "embedding.",
    )
    modality: Literal["auto", "text", "image"] = Field(
        "auto", description="How to read plain strings: auto reads data: URIs as images and all others as texts."
    )
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64 is little-endian float32.")
    dimensions: int | None = Field(None, description="Must be the width of the model's embeddings, if it is given.")


class EmbeddingItem(ResponseModel):
    """One embedding of unit norm."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingResponse(ResponseModel):
    """The embeddings, in the order of the inputs."""

    object: Literal["list"] = "list"
    model: str
    data: list[EmbeddingItem]
    usage: Usage
    fingerprint: Fingerprint


class ModelCard(ResponseModel):
    """The model that this server runs."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the replica loaded the model, in seconds since 1970.")
    owned_by: str = "sightline"
    dimensions: int
    image_size: int
    text_length: int
    device: str
    dtype: str
    fingerprint: Fingerprint


class ModelList(ResponseModel):
    """The list of models, which has one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def add_openai_routes(app: FastAPI, service: Service) -> None:
    """Register the routes."""

    @app.post("/embeddings", include_in_schema=False)  # the path that infinity uses
    @app.post(
        "/v1/embeddings",
        response_model=EmbeddingResponse,
        responses=documented(400, 404, 413),
        openapi_extra=body_of(EmbeddingRequest, **{ANY_IMAGE: IMAGE_BODY, "multipart/form-data": _FORM_SCHEMA}),
        tags=["embeddings"],
    )
    async def create_embeddings(request: Request) -> Response:
        """Embed texts and images into one space.

        Embeddings have unit norm, so their dot product is their cosine. The body may also be an image file, with
        `model` and `encoding_format` in the query, or a form with several image files and these two fields.
        """
        context = context_of(request)
        model, encoding, inputs = await _read_request(request, service)
        service.check_model(model)
        vectors = await embed_inputs(inputs, service, context)
        as_base64 = encoding == "base64"

        def list_items(start: int, stop: int) -> list[dict[str, Any]]:
            return [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": encode_vector(vectors[index]) if as_base64 else vectors[index],
                }
                for index in range(start, stop)
            ]

        content = {
            "object": "list",
            "model": service.name,
            "data": LongList(len(vectors), vectors.shape[1], list_items),
            "usage": service.usage(context).model_dump(),
            "fingerprint": service.fingerprint().model_dump(),
        }
        return await make_response(content, service, context)

    @app.get("/models", include_in_schema=False)
    @app.get("/v1/models", response_model=ModelList, responses=documented(), tags=["models"])
    async def list_models() -> PydanticResponse:
        """The model that this server runs."""
        return PydanticResponse(ModelList(data=[make_card(service)]))

    @app.get("/v1/models/{id:path}", response_model=ModelCard, responses=documented(404), tags=["models"])
    async def retrieve_model(id: str) -> PydanticResponse:
        """The model with this id. An id may contain slashes."""
        service.check_model(id)
        return PydanticResponse(make_card(service))


def make_card(service: Service) -> ModelCard:
    """The description of the model for clients."""
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


def list_inputs(body: EmbeddingRequest, vocabulary: TokenVocabulary | None) -> list[EmbeddingInput]:
    """The inputs of a request, in order. Raises `ApiError`."""
    if (body.input is None) == (body.messages is None):
        raise ApiError("invalid_request", "give exactly one of input and messages", param="input")
    if body.messages is not None:
        inputs = [_read_conversation(body.messages)] if body.messages else []
    elif isinstance(body.input, list) and body.input and isinstance(body.input[0], int):
        inputs = [_read_tokens(body.input, "input", vocabulary)]  # a list of ids is one text
    elif isinstance(body.input, list):
        inputs = [
            _read_tokens(item, f"input.{n}", vocabulary)
            if isinstance(item, list)
            else _read_input(item, f"input.{n}", body.modality)
            for n, item in enumerate(body.input)
        ]
    else:
        inputs = [_read_input(body.input, "input", body.modality)]
    if not inputs:
        raise ApiError("invalid_request", "nothing to embed: the list is empty", param="input")
    return inputs


def _read_input(
    item: str | TextPart | ImagePart | int | None, param: str, modality: Literal["auto", "text", "image"]
) -> EmbeddingInput:
    if isinstance(item, TextPart):
        return EmbeddingInput("text", item.text, param)
    if isinstance(item, ImagePart):
        return EmbeddingInput("image", item.image, param)
    if isinstance(item, str):
        is_image = modality == "image" or (modality == "auto" and is_data_uri(item))
        return EmbeddingInput("image" if is_image else "text", item, param)
    raise ApiError("invalid_request", f"{param}: a single token id: send a list of token ids", param=param)


def _read_tokens(ids: Sequence[Any], param: str, vocabulary: TokenVocabulary | None) -> EmbeddingInput:
    """Decode a list of OpenAI's token ids to the text. Raises `ApiError`."""
    if vocabulary is None:
        raise ApiError(
            "unsupported_input",
            f"{param}: token ids, but this server has no token_vocabulary to decode them: send the text "
            "(LangChain: check_embedding_ctx_length=False)",
            param=param,
        )
    try:
        return EmbeddingInput("text", vocabulary.decode(ids), param)
    except (KeyError, TypeError):
        raise ApiError(
            "unsupported_input", f"{param}: the token ids are not in this server's token_vocabulary", param=param
        ) from None


def _read_conversation(messages: list[Message]) -> EmbeddingInput:
    """The one input of a conversation: its image or, without an image, its texts, joined by line breaks.

    SigLIP cannot embed a text and an image together. Texts beside an image are instructions for other models
    ("represent this image") and are ignored here. Raises `ApiError`.
    """
    texts: list[str] = []
    images: list[EmbeddingInput] = []
    for number, message in enumerate(messages):
        if isinstance(message.content, str):
            texts.append(message.content)
            continue
        for part in message.content:
            if part.type == "image_url":
                images.append(read_image_url(part.image_url, f"messages.{number}"))
            else:
                texts.append(part.text or "")
    if len(images) > 1:
        raise ApiError(
            "unsupported_input",
            f"messages: {len(images)} images in a conversation, which has one embedding: send them in input instead",
            param="messages",
        )
    return images[0] if images else EmbeddingInput("text", "\n".join(text for text in texts if text), "messages")


async def _read_request(request: Request, service: Service) -> tuple[str | None, str | None, list[EmbeddingInput]]:
    """A request's model, the encoding of the response, and the inputs. Raises `ApiError`."""
    uploads = await read_uploads(request, service.config.limits)
    if uploads is None:
        body = await read_json(request, EmbeddingRequest, ANY_IMAGE, "multipart/form-data")
        service.check_dimensions(body.dimensions, "dimensions")
        return body.model, body.encoding_format, list_inputs(body, service.vocabulary)
    images, fields = uploads
    encoding = fields.get("encoding_format")
    if encoding not in (None, "float", "base64"):
        raise ApiError("invalid_request", "encoding_format: send float or base64", param="encoding_format")
    model = fields.get("model")
    inputs = [EmbeddingInput("image", image, f"image.{n}") for n, image in enumerate(images)]
    return str(model) if model else None, str(encoding) if encoding else None, inputs
