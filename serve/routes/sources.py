"""What embedding routes are asked to embed, in whatever shape it came."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from serve.context import RequestContext
from serve.http.errors import ApiError
from serve.schemas import ImageUrl
from serve.service import Service
from siglip.scoring import Floats


@dataclass(frozen=True)
class Source:
    """One thing to embed: a text, or an image in a string or as its bytes. `param` is the field that it came from."""

    kind: Literal["text", "image"]
    value: str | bytes
    param: str


async def embed_sources(sources: Sequence[Source], service: Service, context: RequestContext) -> Floats:
    """Embeddings of a mixture, in its order: float32 (N, D)."""
    vectors = np.zeros((len(sources), service.about.width), np.float32)
    texts = [n for n, source in enumerate(sources) if source.kind == "text"]
    images = [n for n, source in enumerate(sources) if source.kind == "image"]
    if texts:
        params = [sources[n].param for n in texts]
        vectors[texts] = await service.embedder.embed_texts([str(sources[n].value) for n in texts], params, context)
    if images:
        vectors[images] = await _embed_images([sources[n] for n in images], service, context)
    return vectors


async def _embed_images(images: Sequence[Source], service: Service, context: RequestContext) -> Floats:
    written = [(source.value, source.param) for source in images if isinstance(source.value, str)]
    read = iter(
        await service.image_reader.read([value for value, _ in written], [param for _, param in written], context)
    )
    data = [source.value if isinstance(source.value, bytes) else next(read) for source in images]
    return await service.embedder.embed_images(data, [source.param for source in images], context)


def encode_vector(vector: Floats) -> str:
    """Little-endian float32 in base64, as OpenAI's client asks for when its caller says nothing."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def read_image_url(url: ImageUrl | str | None, param: str) -> Source:
    """The image of a chat message's part."""
    if url is None:
        raise ApiError("invalid_request", f"{param}: an image_url part without image_url", param=param)
    return Source("image", url if isinstance(url, str) else url.url, param)
