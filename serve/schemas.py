"""What goes over the wire: requests and answers, with an example of each.

Requests forbid unknown fields, except for those of other vendors' shapes: their clients send fields that mean nothing
here (`user`, `truncate`, `priority`), and must go on working when a new one is added.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

IMAGE_HELP = "A data: URI, base64, or (where the server fetches) an http(s) URL."
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mO8IyfHgA0wMeAAg1MCAOBWAShOAhDlAAAAAElFTkSuQmCC"
"""A red PNG of 8 x 8 pixels, in base64."""


Strings = Annotated[list[str], Field(fail_fast=True)]
"""A list that is refused at its first wrong item, as all lists here: what is wrong with all of them takes seconds."""


class Strict(BaseModel):
    """A request of Sightline's own: a field that it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _one_mistake(cls, value: Any) -> Any:
        """Of the fields that it does not know the first: a complaint for each of a hundred thousand takes a second."""
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        unknown = next(name for name in value if name not in cls.model_fields)
        return {name: field for name, field in value.items() if name in cls.model_fields or name == unknown}


class Lenient(BaseModel):
    """A request in another vendor's shape."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Answer(BaseModel):
    """An answer."""

    model_config = ConfigDict(frozen=True)


class ErrorBody(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str


class Error(Answer):
    """OpenAI's error envelope: the body of every answer that is not a success."""

    error: ErrorBody


class Fingerprint(Answer):
    """What decided the numbers. The batch job's manifest has the same strings as model.weights and labels.digest."""

    model: str = Field(description="Identity of the checkpoint's files.")
    labels: str | None = Field(None, description="Digest of the label set: names and prompts, in order.")


class Usage(Answer):
    """What was computed. Every text is padded to the model's length, so its tokens do not depend on its words."""

    prompt_tokens: int
    total_tokens: int
    images: int = 0


# --- POST /v1/embeddings: OpenAI's shape, with images


class TextPart(Lenient):
    """A text to embed."""

    text: str


class ImagePart(Lenient):
    """An image to embed."""

    image: str = Field(description=IMAGE_HELP)


class ImageUrl(Lenient):
    """Where a chat message's image is."""

    url: str = Field(description=IMAGE_HELP)


class ContentPart(Lenient):
    """A part of a chat message."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | str | None = None


class Message(Lenient):
    """A chat message with one text or one image in it, as vLLM's embedding endpoint takes it."""

    role: str = "user"
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)]


def _tag_input(value: Any) -> str:
    """Which kind of input a value is, so that it is compared with that one alone."""
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
    | Annotated[list[int], Field(fail_fast=True), Tag("Tokens")],
    Discriminator(_tag_input),
]
Inputs = Annotated[list[OneInput], Field(fail_fast=True)]


def _tag_inputs(value: Any) -> str:
    return "List" if isinstance(value, list) else _tag_input(value)


class EmbeddingRequest(Lenient):
    """Texts and images to embed. Exactly one of `input` and `messages`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "tiny", "input": ["a photo of a red circle", f"data:image/png;base64,{PIXEL}"]},
                {"model": "tiny", "input": [{"text": "a red circle"}, {"image": PIXEL}], "encoding_format": "float"},
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
    ) = Field(None, description="Texts, data: URIs of images, {text} or {image}; or a list of them.")
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = Field(
        None, description="Instead of input: each message's one text or image_url is embedded."
    )
    modality: Literal["auto", "text", "image"] = Field(
        "auto", description="How to read plain strings. auto takes data: URIs for images and all else for text."
    )
    encoding_format: Literal["float", "base64"] = Field("float", description="base64 is little-endian float32.")
    dimensions: int | None = Field(None, description="Only the model's own width is possible.")


class EmbeddingItem(Answer):
    """One embedding of unit norm."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingAnswer(Answer):
    """The embeddings, in the order of the input."""

    object: Literal["list"] = "list"
    model: str
    data: list[EmbeddingItem]
    usage: Usage
    fingerprint: Fingerprint


# --- POST /v1/classify and /v1/similarity: Sightline's own

Labels = Annotated[list[str], Field(min_length=1, fail_fast=True)]


class LabelQuestion(Strict):
    """What is asked of images: labels, or the name of a registered label set."""

    labels: Labels | None = Field(None, description="Label names. Exactly one of labels and label_set.")
    label_set: str | None = Field(None, description="The name of a registered label set: see GET /v1/label-sets.")
    templates: Labels | None = Field(
        None,
        description="Prompts with {label} in them, averaged; only with labels. Default: This is a photo of {label}.",
    )
    top_k: int | None = Field(
        None, ge=1, description="At most this many labels an image. Default: the label set's, or all of labels."
    )
    threshold: float | None = Field(
        None, ge=0, le=1, description="Labels that score less are left out. Default: the label set's, or 0."
    )
    activation: Literal["sigmoid", "softmax"] = Field(
        "sigmoid",
        description="sigmoid: each label is a question of its own. softmax: exactly one of them is right.",
    )


class ClassifyRequest(LabelQuestion):
    """One or many images, and what to ask of them."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"image": PIXEL, "labels": ["red square", "blue circle"]},
                {"images": [PIXEL, PIXEL], "label_set": "shapes", "top_k": 3, "threshold": 0.1},
            ]
        }
    )

    model: str | None = Field(None, description="An id of GET /v1/models; may be left out.")
    image: str | None = Field(None, description=f"{IMAGE_HELP} Exactly one of image and images.")
    images: Labels | None = Field(None, description="Several of them.")


class LabelScore(Answer):
    """A label and its score, a probability."""

    label: str
    score: float


class Classification(Answer):
    """One image's labels, best first. Empty when none reached its threshold."""

    object: Literal["classification"] = "classification"
    index: int
    labels: list[LabelScore]


class ClassifyAnswer(Answer):
    """The classifications, in the order of the images."""

    object: Literal["list"] = "list"
    model: str
    label_set: str | None = None
    data: list[Classification]
    usage: Usage
    fingerprint: Fingerprint


class SimilarityRequest(Strict):
    """Texts against images."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"texts": ["a red square", "a blue circle"], "images": [PIXEL], "top_k": 1}]}
    )

    model: str | None = Field(None, description="An id of GET /v1/models; may be left out.")
    texts: Labels
    images: Labels = Field(description=IMAGE_HELP)
    top_k: int | None = Field(None, ge=1, description="At most this many matches of each; default all.")


class Match(Answer):
    """A text or an image that was found, by its index in the request."""

    index: int
    cosine: float
    score: float = Field(description="The model's probability that they belong together.")


class Ranking(Answer):
    """The matches of one text or image, best first."""

    index: int
    matches: list[Match]


class SimilarityAnswer(Answer):
    """Both directions of retrieval."""

    object: Literal["similarity"] = "similarity"
    model: str
    texts: list[Ranking] = Field(description="For each text, the images.")
    images: list[Ranking] = Field(description="For each image, the texts.")
    usage: Usage
    fingerprint: Fingerprint


# --- what there is


class ModelCard(Answer):
    """The model that this server runs."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When this replica loaded it, in seconds since 1970.")
    owned_by: str = "sightline"
    dimensions: int
    image_size: int
    text_length: int
    device: str
    dtype: str
    fingerprint: Fingerprint


class ModelList(Answer):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class LabelSetCard(Answer):
    """A registered label set."""

    id: str
    object: Literal["label_set"] = "label_set"
    labels: list[str]
    templates: list[str]
    threshold: float
    top_k: int | None
    fingerprint: Fingerprint


class LabelSetList(Answer):
    """The registered label sets."""

    object: Literal["list"] = "list"
    data: list[LabelSetCard]


class Health(Answer):
    """Whether the process lives, or is ready."""

    status: Literal["ok", "ready"]


# --- POST /: Hugging Face's shape


class HuggingFaceParameters(Lenient):
    """Of zero-shot image classification."""

    candidate_labels: Labels
    hypothesis_template: str | None = None


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


# --- POST /v2/embed: Cohere's shape


class CohereContent(Lenient):
    """A text or an image of an input."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class CohereInput(Lenient):
    """An input with one text or one image in it."""

    content: Annotated[list[CohereContent], Field(fail_fast=True)]


class CohereRequest(Lenient):
    """Exactly one of texts, images and inputs."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "tiny", "input_type": "image", "images": [f"data:image/png;base64,{PIXEL}"]},
                {"model": "tiny", "input_type": "search_query", "texts": ["a red square"]},
            ]
        }
    )

    model: str
    input_type: str | None = None
    texts: Strings | None = None
    images: Strings | None = None
    inputs: Annotated[list[CohereInput], Field(fail_fast=True)] | None = None
    embedding_types: Annotated[list[Literal["float", "base64"]], Field(fail_fast=True)] = Field(["float"], min_length=1)
    output_dimension: int | None = None


class CohereAnswer(Answer):
    """The embeddings by type, in the order of the input."""

    response_type: Literal["embeddings_by_type"] = "embeddings_by_type"
    id: str
    embeddings: dict[str, Any]
    texts: list[str]
    meta: dict[str, Any]
    fingerprint: Fingerprint
