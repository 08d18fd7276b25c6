"""The inputs of embedding routes, in one form for all clients' APIs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from serve.context import RequestContext
from serve.embedding.inputs import CUT, Truncation
from serve.fetch.recognition import is_damaged_image, is_image, is_image_url
from serve.http.errors import ApiError
from serve.http.json_response import LongList
from serve.label_sets.cache import EmbeddedLabelSet
from serve.schemas import ImageUrl, LabelQuery
from serve.service import Service
from siglip.scoring import Floats

Modality = Literal["auto", "text", "image"]
MODALITY_HELP = (
    "How to read plain strings. auto: data: URIs and base64 of image files are images, all others are texts, and URLs "
    "of images are refused. text: all are texts. image: all are images."
)


@dataclass(frozen=True)
class EmbeddingInput:
    """A text or an image to embed. `param` is the field of the request that it came from.

    An image is a string (a data: URI, base64 or a URL) or its encoded bytes.
    """

    kind: Literal["text", "image"]
    value: str | bytes
    param: str


def read_string(value: str, param: str, modality: Modality, *, part: str = "") -> EmbeddingInput:
    """A string of a field that may have texts and images. Raises `ApiError` for the URL of an image.

    `part` is the form of an image in this field that needs no modality, if there is one.

    What looks like an image is one, unless `modality` says otherwise: its embedding as a text would mean nothing. The
    URL of an image is as often meant as a text, so the client has to say which it is.
    """
    if modality != "auto":
        return EmbeddingInput(modality, value, param)
    if is_image_url(value):
        raise ApiError(
            "unsupported_input",
            f'{param}: the URL of an image: send {part and part + " or "}"modality": "image" to embed the image, or '
            '"modality": "text" to embed the URL as a text',
            param=param,
        )
    if not is_image(value):
        _refuse_damaged(value, param)
        return EmbeddingInput("text", value, param)
    return EmbeddingInput("image", value, param)


def read_text(value: str, param: str, modality: Modality = "auto", *, instead: str) -> EmbeddingInput:
    """A string of a field that has texts only. What looks like an image is refused, unless `modality` is `text`.

    `instead` ends the message: it says how to send an image. Raises `ApiError`.
    """
    if modality == "text" or (modality == "auto" and not (is_image(value) or is_image_url(value))):
        if modality == "auto":
            _refuse_damaged(value, param)
        return EmbeddingInput("text", value, param)
    if modality == "image":
        message = f"{param}: modality says image, and this field has texts: {instead}"
        raise ApiError("unsupported_input", message, param=param)
    raise ApiError("unsupported_input", f"{param}: this is an image and not a text: {instead}", param=param)


def _refuse_damaged(value: str, param: str) -> None:
    """Refuse what is neither a text nor an image that can be read. Raises `ApiError`."""
    if is_damaged_image(value):
        raise ApiError(
            "unsupported_input",
            f"{param}: this looks like a file in base64, and not like one of an image: send an image as "
            "data:image/png;base64,... or its base64",
            param=param,
        )


def refuse_images(labels: Sequence[str] | None, param: str) -> None:
    """Refuse labels or templates that look like images: they stand in the wrong field. Raises `ApiError`."""
    for label in labels or ():
        read_text(label, param, instead="labels are texts, and images have a field of their own")


async def embed_inputs(
    inputs: Sequence[EmbeddingInput], service: Service, context: RequestContext, truncation: Truncation = CUT
) -> Floats:
    """Embed texts and images, mixed: float32 (N, D) in the order of `inputs`. Raises `ApiError`."""
    vectors = np.zeros((len(inputs), service.about.width), np.float32)
    texts = [n for n, item in enumerate(inputs) if item.kind == "text"]
    images = [n for n, item in enumerate(inputs) if item.kind == "image"]
    strings, params = [str(inputs[n].value) for n in texts], [inputs[n].param for n in texts]
    checked = await service.embedder.check_texts(strings, params, context, truncation)
    encoded = await _read_images([inputs[n] for n in images], service, context)
    await service.embedder.admit(context, images=len(images), texts=len(texts))
    if texts:
        vectors[texts] = await service.embedder.embed_texts(checked, context, truncation)
    if images:
        vectors[images] = await service.embedder.embed_images(encoded, [inputs[n].param for n in images], context)
    return vectors


async def _read_images(images: Sequence[EmbeddingInput], service: Service, context: RequestContext) -> list[bytes]:
    strings = [(item.value, item.param) for item in images if isinstance(item.value, str)]
    values, params = [value for value, _ in strings], [param for _, param in strings]
    read = iter(await service.image_reader.read(values, params, context))
    return [item.value if isinstance(item.value, bytes) else next(read) for item in images]


async def embed_classification(
    images: Sequence[bytes],
    params: Sequence[str],
    query: LabelQuery,
    service: Service,
    context: RequestContext,
    most_labels: int | None = None,
) -> tuple[EmbeddedLabelSet, Floats]:
    """Find or embed the label set of a query, and embed encoded images: the label set, and float32 (N, D).

    `most_labels` is the largest number of labels that the response may have for one image. Raises `ApiError` and
    `serve.admission.batcher.Expired`.
    """
    found = service.label_sets.find(query)
    labels = found.count_selected(query.top_k)
    if most_labels is not None and labels > most_labels:
        message = f"{labels} labels; this path returns all, and the limit is {most_labels}: use /v1/classify with top_k"
        raise ApiError("too_many_pairs", message, param="label_set")
    pairs = len(images) * labels
    await service.embedder.admit(context, images=len(images), texts=found.missing, cached=found.cached, pairs=pairs)
    label_set = await service.label_sets.embed(found, context)
    return label_set, await service.embedder.embed_images(images, params, context)


def list_vectors(vectors: Floats) -> LongList:
    """Embeddings (N, D) as a JSON list of lists of numbers."""
    return LongList(len(vectors), vectors.shape[1], lambda start, stop: list(vectors[start:stop]))


def read_image_url(url: ImageUrl | str | None, param: str) -> EmbeddingInput:
    """The image of a chat message's `image_url` part. Raises `ApiError`."""
    if url is None:
        raise ApiError("invalid_request", f"{param}: an image_url part without image_url", param=param)
    return EmbeddingInput("image", url if isinstance(url, str) else url.url, param)


def check_part(kind: Literal["text", "image_url"], text: str | None, url: ImageUrl | str | None, param: str) -> None:
    """Refuse a message's part of type `kind` that has the other kind's content too. Raises `ApiError`."""
    if (kind == "image_url" and text) or (kind == "text" and url is not None):
        other = "text" if kind == "image_url" else "image_url"
        message = f"{param}: a part of type {kind} with {other}: send one part for each, because no embedding has both"
        raise ApiError("unsupported_input", message, param=param)
