"""What several routes' requests and answers have in common. Each route's own are beside it, in `serve.routes`.

Requests forbid unknown fields, except for those of other vendors' shapes: their clients send fields that mean nothing
here (`user`, `truncate`, `priority`), and must go on working when a new one is added.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

IMAGE_HELP = "A data: URI, base64, or (where the server fetches) an http(s) URL."
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mO8IyfHgA0wMeAAg1MCAOBWAShOAhDlAAAAAElFTkSuQmCC"
"""A red PNG of 8 x 8 pixels, in base64."""


MAX_ITEMS = 32_768
"""Items of a list in a request, whatever the limits: so many are read before the limits are looked at."""
SOME = Field(fail_fast=True, max_length=MAX_ITEMS)
"""A list is refused at its first wrong item: what is wrong with all of them takes seconds."""
Strings = Annotated[list[str], SOME]


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


class ResponseModel(BaseModel):
    """An answer."""

    model_config = ConfigDict(frozen=True)


class ErrorBody(ResponseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str


class Error(ResponseModel):
    """OpenAI's error envelope: the body of every answer that is not a success."""

    error: ErrorBody


class Fingerprint(ResponseModel):
    """What decided the numbers. The batch job's manifest has the same strings as model.weights and labels.digest."""

    model: str = Field(description="Identity of the checkpoint's files.")
    labels: str | None = Field(None, description="Digest of the label set: names and prompts, in order.")


class Usage(ResponseModel):
    """What was computed. Every text is padded to the model's length, so its tokens do not depend on its words."""

    prompt_tokens: int
    total_tokens: int
    images: int = 0


class ImageUrl(Lenient):
    """Where a chat message's image is."""

    url: str = Field(description=IMAGE_HELP)


Labels = Annotated[Strings, Field(min_length=1)]


class LabelQuery(Strict):
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
        None, ge=0, le=1, description="Labels that score less are left out. Default: the label set's for sigmoid, or 0."
    )
    activation: Literal["sigmoid", "softmax"] = Field(
        "sigmoid",
        description="sigmoid: each label is a question of its own. softmax: exactly one of them is right.",
    )


class LabelScore(ResponseModel):
    """A label and its score, a probability. `band` is there when the registered label set has bands."""

    label: str
    score: float
    band: Literal["accept", "review"] | None = Field(None, exclude_if=lambda band: band is None)


class Health(ResponseModel):
    """Whether the process lives, or is ready."""

    status: Literal["ok", "ready"]
