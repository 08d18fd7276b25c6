"""OpenAI's API: `POST /v1/embeddings`, for texts and images, and `GET /v1/models`.

Clients of vLLM and infinity use the same routes: vLLM's send `messages` instead of `input`, infinity's send
`modality: image` and paths without `/v1`.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import Response

from serve.embedding.vector_encoding import VectorEncoding
from serve.http.bodies.json_body import read_json
from serve.http.bodies.uploads import ANY_IMAGE, read_uploads
from serve.http.errors import ApiError
from serve.http.json_response import LongList, make_response
from serve.http.responses import IMAGE_BODY, PydanticResponse, body_of, context_of, documented
from serve.options.choices import EmbeddingChoices
from serve.options.reading import read_embedding_options
from serve.options.table import EMBEDDING_OPTIONS, schema_of
from serve.routes.embedding_request import EmbeddingRequest, list_inputs
from serve.routes.inputs import EmbeddingInput, embed_inputs
from serve.schemas import Fingerprint, ResponseModel, Usage
from serve.service import Service
from siglip.scoring import format_cosine

OPENAI_AGENTS = ("OpenAI/", "AsyncOpenAI/", "AzureOpenAI/", "AsyncAzureOpenAI/")
"""How the User-Agent of OpenAI's clients for Python and Node begins."""
_FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["image"],
    "properties": {
        "image": {"type": "array", "items": IMAGE_BODY, "minItems": 1},
        "model": {"type": "string"},
    },
}
"""The schema of a multipart body: image files, and options."""
schema_of(EMBEDDING_OPTIONS)(_FORM_SCHEMA)


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


class SearchCard(ResponseModel):
    """The output that POST /v1/search searches."""

    rows: int
    searched: int = Field(description="Without those that are too new: see `as_of` of a search.")
    labels: list[str]
    thumbnails: bool
    index: bool


class ModelCard(ResponseModel):
    """The model that this server runs."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the replica loaded the model, in seconds since 1970.")
    owned_by: str = "sightline"
    dimensions: int
    image_size: int | None = Field(None, exclude_if=lambda size: size is None, description="Pixels at a side.")
    patches: int | None = Field(
        None,
        exclude_if=lambda patches: patches is None,
        description="Most patches of an image, for a model that keeps the image's proportions.",
    )
    text_length: int
    device: str
    dtype: str
    min_cosine: float | None = Field(
        description="Lowest cosine of the self-test's images with their embeddings in float32; null in float32."
    )
    fingerprint: Fingerprint
    search: SearchCard | None = Field(None, exclude_if=lambda card: card is None)


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
        `model` and options in the query, or a form with several image files and these fields.
        """
        context = context_of(request)
        model, choices, inputs = await _read_request(request, service)
        service.check_model(model)
        check_client(request.headers.get("user-agent", ""), choices.encoding)
        vectors = await embed_inputs(inputs, service, context, choices.truncation(service.about.text_length))

        def list_items(start: int, stop: int) -> list[dict[str, Any]]:
            rows = choices.encoding.encode(vectors[start:stop])
            return [
                {"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows, start=start)
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


def check_client(agent: str, encoding: VectorEncoding) -> None:
    """Refuse OpenAI's clients base64 of other numbers than little-endian float32. Raises `ApiError`.

    `agent` is the User-Agent. These clients ask for base64 by themselves, and read it as float32 whatever it is.
    """
    if agent.startswith(OPENAI_AGENTS) and encoding.as_base64 and encoding != VectorEncoding(as_base64=True):
        raise ApiError(
            "invalid_request",
            "encoding_format: OpenAI's client asks for base64 and reads it as little-endian float32: send "
            "encoding_format=float for other numbers",
            param="encoding_format",
        )


def make_card(service: Service) -> ModelCard:
    """The description of the model for clients."""
    about = service.about
    return ModelCard(
        id=service.name,
        created=about.loaded,
        dimensions=about.width,
        image_size=about.spec.size,
        patches=None if about.spec.patches is None else about.spec.patches.count,
        text_length=about.text_length,
        device=about.device,
        dtype=about.dtype,
        min_cosine=None if about.min_cosine is None else float(format_cosine(about.min_cosine)),
        fingerprint=service.fingerprint(),
        search=None if service.search is None else SearchCard(**service.search.opened.describe()),
    )


async def _read_request(
    request: Request, service: Service
) -> tuple[str | None, EmbeddingChoices, list[EmbeddingInput]]:
    """A request's model, its options, and the inputs. Raises `ApiError`."""
    uploads = await read_uploads(request, service.config.limits)
    if uploads is None:
        body = await read_json(request, EmbeddingRequest, ANY_IMAGE, "multipart/form-data")
        choices = read_embedding_options(body.options(), service, known=EmbeddingRequest.model_fields, encodes=True)
        return body.model, choices, list_inputs(body, service.vocabulary)
    images, fields = uploads
    options = {name: value for name, value in fields.items() if value != ""}
    for name in ("input", "messages"):
        if name in options:
            message = f"{name}: a form or an image as the body has images only: send texts as JSON"
            raise ApiError("unsupported_input", message, param=name)
    choices = read_embedding_options(options, service, known=("model", "modality"), encodes=True)
    model = options.get("model")
    inputs = [EmbeddingInput("image", image, f"image.{n}") for n, image in enumerate(images)]
    return str(model) if model else None, choices, inputs
