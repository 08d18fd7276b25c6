"""The JSON body of `POST /v1/embeddings`, and its texts and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from serve.http.errors import ApiError
from serve.options.table import EMBEDDING_OPTIONS, schema_of
from serve.routes.inputs import (
    MODALITY_HELP,
    EmbeddingInput,
    Modality,
    check_part,
    read_image_url,
    read_string,
    read_text,
)
from serve.schemas import BOUNDED, EXAMPLE_PNG, IMAGE_HELP, ImageUrl, Lenient, Strict, VendorRequest
from serve.tokens import TokenVocabulary


class InputPart(Strict):
    """A text or an image to embed: exactly one of the fields. `type` is ignored, other fields are refused."""

    type: str | None = None
    text: str | None = None
    image: str | None = Field(None, description=IMAGE_HELP)
    image_url: ImageUrl | str | None = Field(None, description=IMAGE_HELP)


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
    if isinstance(value, (dict, InputPart)):
        return "Part"
    if isinstance(value, list):
        return "Tokens"
    return "Token" if isinstance(value, int) else "Text"


Token = Annotated[int, Field(strict=True)]
"""A token id. `true` and 1.0 are none."""
OneInput = Annotated[
    Annotated[str, Tag("Text")]
    | Annotated[InputPart, Tag("Part")]
    | Annotated[Token, Tag("Token")]
    | Annotated[list[Token], BOUNDED, Tag("Tokens")],
    Discriminator(_tag_input),
]
Inputs = Annotated[list[OneInput], BOUNDED]


def _tag_inputs(value: Any) -> str:
    return "List" if isinstance(value, list) else _tag_input(value)


def _add_options(schema: dict[str, Any]) -> None:
    schema_of(EMBEDDING_OPTIONS)(schema)
    schema["examples"] = [
        {"model": "tiny", "input": ["a photo of a red circle", f"data:image/png;base64,{EXAMPLE_PNG}"]},
        {"model": "tiny", "input": [{"text": "a red circle"}, {"image": EXAMPLE_PNG}], "encoding_format": "float"},
    ]


class EmbeddingRequest(VendorRequest):
    """Texts and images to embed. Exactly one of `input` and `messages`."""

    model_config = ConfigDict(json_schema_extra=_add_options)

    model: str = Field(description="An id of GET /v1/models.")
    input: (
        Annotated[
            Annotated[str, Tag("Text")]
            | Annotated[InputPart, Tag("Part")]
            | Annotated[Token, Tag("Token")]
            | Annotated[Inputs, Tag("List")],
            Discriminator(_tag_inputs),
        ]
        | None
    ) = Field(None, description="A text, the data: URI of an image, {text} or {image}; or a list of these.")
    messages: Annotated[list[Message], BOUNDED] | None = Field(
        None,
        description="A conversation, instead of input. Its one image, or its joined texts, make one embedding.",
    )
    modality: Modality = Field("auto", description=MODALITY_HELP)


def list_inputs(body: EmbeddingRequest, vocabulary: TokenVocabulary | None) -> list[EmbeddingInput]:
    """The inputs of a request, in order. Raises `ApiError`."""
    if (body.input is None) == (body.messages is None):
        raise ApiError("invalid_request", "give exactly one of input and messages", param="input")
    if body.messages is not None:
        inputs = [_read_conversation(body.messages, body.modality)] if body.messages else []
    elif isinstance(body.input, list) and body.input and isinstance(body.input[0], int):
        inputs = [_read_tokens(body.input, "input", vocabulary, body.modality)]  # a list of ids is one text
    elif isinstance(body.input, list):
        inputs = [
            _read_tokens(item, f"input.{n}", vocabulary, body.modality)
            if isinstance(item, list)
            else _read_input(item, f"input.{n}", body.modality)
            for n, item in enumerate(body.input)
        ]
    else:
        inputs = [_read_input(body.input, "input", body.modality)]
    if not inputs:
        raise ApiError("invalid_request", "nothing to embed: the list is empty", param="input")
    return inputs


def _read_input(item: str | InputPart | int | None, param: str, modality: Modality) -> EmbeddingInput:
    if isinstance(item, InputPart):
        return _read_part(item, param, modality)
    if isinstance(item, str):
        return read_string(item, param, modality, part='{"image": URL}')
    raise ApiError("invalid_request", f"{param}: a single token id: send a list of token ids", param=param)


def _read_part(part: InputPart, param: str, modality: Modality) -> EmbeddingInput:
    given = [name for name in ("text", "image", "image_url") if getattr(part, name) is not None]
    if len(given) != 1:
        raise ApiError(
            "unsupported_input",
            f"{param}: {' and '.join(given) or 'neither text nor image'}: send each text and each image as an item of "
            "its own, because the model has no joint embedding",
            param=param,
        )
    if part.text is not None:
        return read_text(part.text, f"{param}.text", modality, instead='send it as {"image": ...}')
    if part.image is not None:
        return EmbeddingInput("image", part.image, param)
    return read_image_url(part.image_url, param)


def _read_tokens(
    ids: Sequence[Any], param: str, vocabulary: TokenVocabulary | None, modality: Modality
) -> EmbeddingInput:
    """Decode a list of OpenAI's token ids to the string, and read that. Raises `ApiError`."""
    if vocabulary is None:
        raise ApiError(
            "unsupported_input",
            f"{param}: token ids, but this server has no token_vocabulary to decode them: send the text "
            "(LangChain: check_embedding_ctx_length=False)",
            param=param,
        )
    try:
        text = vocabulary.decode(ids)
    except (KeyError, TypeError, ValueError):
        raise ApiError(
            "unsupported_input",
            f"{param}: the token ids are not in this server's token_vocabulary, or make no text",
            param=param,
        ) from None
    return read_string(text, param, modality)


def _read_conversation(messages: list[Message], modality: Modality) -> EmbeddingInput:
    """The one input of a conversation: its image, or its texts, joined by line breaks.

    SigLIP cannot embed a text and an image together, so both at once are refused, as vLLM does. Raises `ApiError`.
    """
    texts: list[str] = []
    images: list[EmbeddingInput] = []
    for number, message in enumerate(messages):
        if isinstance(message.content, str):
            texts.append(_read_message(message.content, f"messages.{number}.content", modality))
            continue
        for part in message.content:
            check_part(part.type, part.text, part.image_url, f"messages.{number}.content")
            if part.type == "image_url":
                images.append(read_image_url(part.image_url, f"messages.{number}"))
            else:
                texts.append(_read_message(part.text or "", f"messages.{number}.content", modality))
    if len(images) > 1:
        raise ApiError(
            "unsupported_input",
            f"messages: {len(images)} images in a conversation, which has one embedding: send them in input instead",
            param="messages",
        )
    text = "\n".join(text for text in texts if text)
    if images and text:
        raise ApiError(
            "unsupported_input",
            "messages: an image and texts, which have no joint embedding: leave the texts out, or send them in input",
            param="messages",
        )
    return images[0] if images else EmbeddingInput("text", text, "messages")


def _read_message(text: str, param: str, modality: Modality) -> str:
    read_text(text, param, modality, instead="send it as a part of type image_url")
    return text
