"""Checks of a request's images, texts and labels against `limits`, and reading images out of strings."""

from __future__ import annotations

from collections.abc import Sequence

from serve.admission.controller import AdmissionController
from serve.config import EndpointLimits
from serve.context import RequestContext
from serve.fetch.fetcher import Fetcher
from serve.fetch.images import read_images
from serve.http.errors import ApiError
from siglip.families import Family


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

        return await read_images(sources, params, self._fetcher, context.queue_key, hold)


def check_image_count(count: int, limits: EndpointLimits) -> None:
    """Refuse more images than `limits.images`. Raises `ApiError`."""
    if count > limits.images:
        raise ApiError("too_many_images", f"{count} images; the limit is {limits.images} in one request")


def check_texts(texts: Sequence[str], params: Sequence[str], limits: EndpointLimits, family: Family) -> None:
    """Refuse too many texts, too long ones, and those that are empty once the model's text rules are applied.

    Raises `ApiError`, which names the text's field of `params`.
    """
    if len(texts) > limits.texts:
        raise ApiError("too_many_texts", f"{len(texts)} texts; the limit is {limits.texts} in one request")
    for text, param in zip(texts, params, strict=True):
        if len(text) > limits.text_characters:
            raise ApiError(
                "text_too_long",
                f"{param}: {len(text)} characters; the limit is {limits.text_characters}",
                param=param,
            )
        check_unicode(text, param)
        if not family.canonicalize(text):
            raise ApiError(
                "invalid_request",
                f"{param}: nothing of this text is left after the model's text rules are applied",
                param=param,
            )


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
