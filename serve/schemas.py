"""Pydantic models that several routes share. Each route's own models are in its module of `serve.routes`.

Requests of Sightline's own API forbid unknown fields. Requests of other vendors' APIs ignore them, except those that
would change the response (`serve.options`): the vendors' clients send fields without a meaning here (`user`,
`priority`), and must keep working when they add a field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from siglip.label_text.values import Count, Share

IMAGE_HELP = "A data: URI, base64 or, if the server has fetch.enabled, an http(s) URL."
EXAMPLE_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mO8IyfHgA0wMeAAg1MCAOBWAShOAhDlAAAAAElFTkSuQmCC"
"""A red PNG of 8 x 8 pixels, in base64."""


MAX_ITEMS = 32_768
"""Largest number of items in any list of a request. The configured limits, which are smaller, are checked later."""
BOUNDED = Field(fail_fast=True, max_length=MAX_ITEMS)
"""Pydantic stops at a list's first wrong item: collecting the errors of all items would take seconds."""
Strings = Annotated[list[str], BOUNDED]


class RequestModel(BaseModel):
    """A request, or a part of one. A field that is null counts as not given, whatever its type."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict) and None in value.values():
            return {name: field for name, field in value.items() if field is not None}
        return value


class Strict(RequestModel):
    """A request of Sightline's own API: an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown(cls, value: Any) -> Any:
        """Drop all unknown fields except the first: an error for each of a hundred thousand fields takes a second."""
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(name for name in value if name not in known)
        return {name: field for name, field in value.items() if name in known or name == unknown}


class Lenient(RequestModel):
    """A part of a request of another vendor's API: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class VendorRequest(RequestModel):
    """A request of another vendor's API. Unknown fields are kept for `serve.options`, which knows some of them."""

    model_config = ConfigDict(extra="allow")

    def options(self) -> dict[str, Any]:
        """The fields that are not fields of this model."""
        return self.model_extra or {}


class ResponseModel(BaseModel):
    """A response, or a part of one."""

    model_config = ConfigDict(frozen=True)


class ErrorBody(ResponseModel):
    """The error: `message` says what to change, `param` names the field, `code` is for programs."""

    message: str
    type: str
    param: str | None = None
    code: str


class Error(ResponseModel):
    """OpenAI's error envelope: the body of every response that is not a success."""

    error: ErrorBody


class Fingerprint(ResponseModel):
    """Model and label set of a response. The batch job's manifest has the same strings as model.weights and
    labels.digest."""

    model: str = Field(description="Digest of the checkpoint's files.")
    labels: str | None = Field(None, description="Digest of the label set: names and prompts, in order.")


class Usage(ResponseModel):
    """The images and text tokens that were computed. Tokens are those that the model read, with each text's end token
    and without padding."""

    prompt_tokens: int
    total_tokens: int
    images: int = 0
    truncated_texts: int = Field(
        0, description="Texts that are longer than the model's input: their ends were cut off."
    )


class ImageUrl(Lenient):
    """The image of a chat message."""

    url: str = Field(description=IMAGE_HELP)


NonEmptyStrings = Annotated[Strings, Field(min_length=1)]


class LabelQuery(Strict):
    """The labels to score, or the name of a registered label set, and how to score them."""

    labels: NonEmptyStrings | None = Field(None, description="Label names. Give exactly one of labels and label_set.")
    label_set: str | None = Field(None, description="The name of a registered label set: see GET /v1/label-sets.")
    templates: NonEmptyStrings | None = Field(
        None,
        description="Prompts that contain {label}; the embeddings of several are averaged. Only with labels. Default: "
        "This is a photo of {label}.",
    )
    top_k: Count | None = Field(
        None,
        description="At most this many labels for each image. Default: the top_k of the label set, or all of labels.",
    )
    threshold: Share | None = Field(
        None,
        description="Labels with a lower score are left out. Default: the label set's threshold for sigmoid, else 0.",
    )
    activation: Literal["sigmoid", "softmax"] = Field(
        "sigmoid",
        description="sigmoid: the scores of the labels are independent. softmax: exactly one label is correct, and the "
        "scores add up to 1.",
    )


class LabelScore(ResponseModel):
    """A label and its score, a probability.

    It has a `band` if the registered label set has bands, and the score reaches the label set's own threshold.
    """

    label: str
    score: float
    band: Literal["accept", "review"] | None = Field(None, exclude_if=lambda band: band is None)


class Health(ResponseModel):
    """The status of the process: it responds (ok), or it is ready for requests."""

    status: Literal["ok", "ready"]
