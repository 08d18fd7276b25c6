"""Checks of a request's images, texts and labels against `limits`, and reading images out of strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve.admission.controller import AdmissionController
from serve.config import EndpointLimits
from serve.context import RequestContext
from serve.fetch.fetcher import Fetcher
from serve.fetch.images import read_images
from serve.http.errors import ApiError
from siglip.families import Family

TEXT_CHARACTERS = 8192
"""Characters of a text that are read. A model's input has some 64 tokens, and a token has some four characters. The
largest batch of such texts fits into a call of the model, which may hold 4 MiB."""


@dataclass(frozen=True)
class Truncation:
    """What happens to a text that has more tokens than the model's input: its end is cut off, or it is refused.

    It is refused if `field` names the request's field that asks for this. `tokens` is the number of tokens that a text
    may then have, None for the model's own. `reason` ends the refusal's message.
    """

    field: str | None = None
    tokens: int | None = None
    reason: str = ""

    def check(self, tokens: int, longest: int, param: str) -> None:
        """Refuse a text of `param` with this number of tokens, if it asks for this. Raises `ApiError`.

        `longest` is the number of tokens of the model's input. A larger number of `tokens` need not be exact.
        """
        most = longest if self.tokens is None else min(self.tokens, longest)
        if self.field is None or tokens <= most:
            return
        count = f"more than {longest}" if tokens > longest else str(tokens)
        end = f"; {self.reason}" if self.reason else ""
        raise ApiError("text_too_long", f"{param}: {count} tokens, and {self.field} allows {most}{end}", param=param)


CUT = Truncation()
"""A long text's end is cut off."""


@dataclass(frozen=True)
class CheckedText:
    """A text's first characters, whether it has more, and the request's field that it came from."""

    text: str
    is_cut: bool
    param: str


class ImageReader:
    """Reads the encoded images of a request: data: URIs, base64 and URLs.

    It does not decode the images (see `serve.decoder_pool`).
    """

    def __init__(self, limits: EndpointLimits, fetcher: Fetcher, admission: AdmissionController) -> None:
        self._limits = limits
        self._fetcher = fetcher
        self._admission = admission

    async def read(self, sources: Sequence[str], params: Sequence[str], context: RequestContext) -> list[bytes]:
        """Return the encoded images of `sources`, in order. `params` name the request's fields that they came from.

        Fetched bytes count against `limits.body_bytes` and `limits.in_flight_bytes`, as the bytes of a body do.
        Raises `ApiError`.
        """
        check_image_count(len(sources), self._limits)
        limit, fetched = self._limits.body_bytes, 0

        def hold(count: int) -> None:
            nonlocal fetched
            fetched += count
            if fetched > limit:
                raise ApiError("body_too_large", f"the images behind the URLs have more than {limit} bytes together")
            self._admission.add_bytes(context.permit, count)

        return await read_images(sources, params, self._fetcher, context, hold)


def check_image_count(count: int, limits: EndpointLimits) -> None:
    """Refuse more images than `limits.images`. Raises `ApiError`."""
    if count > limits.images:
        raise ApiError("too_many_images", f"{count} images; the limit is {limits.images} in one request")


def check_texts(
    texts: Sequence[str], params: Sequence[str], limits: EndpointLimits, family: Family
) -> list[CheckedText]:
    """Cut texts to `TEXT_CHARACTERS`; refuse too many texts, and those of which the model's text rules leave nothing.

    Raises `ApiError`, which names the text's field of `params`.
    """
    if len(texts) > limits.texts:
        raise ApiError("too_many_texts", f"{len(texts)} texts; the limit is {limits.texts} in one request")
    checked = []
    for text, param in zip(texts, params, strict=True):
        first = CheckedText(cut_characters(text), len(text) > TEXT_CHARACTERS, param)
        check_unicode(first.text, param)
        if not family.canonicalize(first.text):
            where = f"its first {TEXT_CHARACTERS} characters" if first.is_cut else "this text"
            raise ApiError(
                "invalid_request",
                f"{param}: nothing of {where} is left after the model's text rules are applied",
                param=param,
            )
        checked.append(first)
    return checked


def cut_characters(text: str) -> str:
    """The first `TEXT_CHARACTERS` of a text, without the word that they end in."""
    if len(text) <= TEXT_CHARACTERS:
        return text
    first = text[: TEXT_CHARACTERS + 1]
    return first[: max(first.rfind(space) for space in " \n\t") + 1] or first[:-1]


def check_labels(names: Sequence[str], templates: Sequence[str], limits: EndpointLimits) -> None:
    """Refuse too many prompts, and labels or templates that are too long. Raises `ApiError`."""
    count = len(names) * len(templates)
    if count > limits.labels:
        raise ApiError(
            "too_many_labels",
            f"{len(names)} labels with {len(templates)} template(s) make {count} prompts; the limit is "
            f"{limits.labels}: register larger sets in label_sets",
            param="labels",
        )
    for param, texts in (("labels", names), ("templates", templates)):
        for text in texts:
            check_unicode(text, param)
            if len(text) > limits.label_characters:
                raise ApiError(
                    "label_too_long",
                    f"{param}: one has {len(text)} characters; the limit is {limits.label_characters}",
                    param=param,
                )


def check_unicode(text: str, param: str) -> None:
    """Refuse a lone surrogate: JSON can write half of a surrogate pair, which UTF-8 cannot. Raises `ApiError`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError("invalid_request", f"{param}: half of a surrogate pair is not valid text", param=param) from None
