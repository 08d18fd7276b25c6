"""Points of Qdrant: a local folder for the client's embedded mode, or a collection on a server."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

from curation.export.job import Job, Target
from curation.export.rows import describe, dump
from curation.tagged_output import TaggedOutput
from storage.settings import ConfigError
from storage.store import StoreError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import PointStruct

COLLECTION = "images"
"""The name of the collection in a local folder."""
OUTPUT = "sightline_output"
"""The entry of a payload that says which output a point is of."""
NAMESPACE = uuid.UUID("5d2f4c0e-6a0b-5c57-9a3e-0d8f4e0b7c11")
"""The namespace of the points' ids: version 5 UUIDs of the rows' ids."""
_ROWS = 256
_REQUEST_BYTES = 16 * 2**20
"""The most bytes of a request. A server refuses 32 MiB."""
_NUMBER_BYTES = 25
"""The most bytes of a number of a vector in JSON, with its comma: the client writes it as a double."""


def write(job: Job, path: str) -> None:
    """Write the points to a folder, or to a server's collection `http(s)://host:port/collection`.

    A point has the embedding as its only vector, compared by cosine, and the row's columns as its payload. Its id
    depends on the row's id only, so a second upload of an output changes nothing. A collection that has points of
    another output is refused, because their ids could be the same. The key of a server is read from QDRANT_API_KEY.

    Qdrant's payloads have no larger numbers than 64-bit integers and doubles: others, in `metadata`, become doubles.
    Memory holds 256 rows, and requests have at most 16 MiB. In the embedded mode the client holds all points in memory:
    about 12 KB each of 768 numbers. It is made for tests; Qdrant advises a server for more than 20,000 points.
    """
    from qdrant_client.http.exceptions import ApiException
    from qdrant_client.models import Distance, VectorParams

    client, name = _connect(path)
    try:
        if not client.collection_exists(name):
            client.create_collection(name, VectorParams(size=job.output.width, distance=Distance.COSINE))
        for points in _make_requests(job):
            client.upsert(name, points, wait=True)
    except ApiException as error:
        raise _explain(path, error) from error
    finally:
        client.close()


def make_id(row_id: str) -> str:
    """Return the id of the point of a row."""
    return str(uuid.uuid5(NAMESPACE, row_id))


def _make_requests(job: Job) -> Iterator[list[PointStruct]]:
    from qdrant_client.models import PointStruct

    held: list[PointStruct] = []
    size = 0
    for batch, vectors in job.batches(_ROWS):
        for row, vector in zip(describe(batch), vectors, strict=True):
            text = dump({**row, OUTPUT: job.output.uri})
            bytes_ = len(text) + _NUMBER_BYTES * len(vector)
            if held and size + bytes_ > _REQUEST_BYTES:
                yield held
                held, size = [], 0
            payload: dict[str, Any] = orjson.loads(text)
            held.append(PointStruct(id=make_id(row["id"]), vector=vector.tolist(), payload=payload))
            size += bytes_
        if len(held) >= _ROWS:
            yield held
            held, size = [], 0
    if held:
        yield held


def _explain(destination: str, error: Exception) -> StoreError:
    return StoreError(f"{destination}: {' '.join(str(error).split())}: run the same command again when it is there")


def _is_server(destination: str) -> bool:
    return destination.startswith(("http://", "https://"))


def _split(destination: str) -> tuple[str, str]:
    """Return a server's URL and the name of the collection."""
    url, _, name = destination.rstrip("/").rpartition("/")
    if not urlsplit(url).hostname or not name:
        raise ConfigError(f"{destination}: write a server and a collection: http://host:6333/collection")
    return url, name


def _connect(destination: str) -> tuple[QdrantClient, str]:
    from qdrant_client import QdrantClient

    if _is_server(destination):
        url, name = _split(destination)
        return QdrantClient(
            url=url, api_key=os.environ.get("QDRANT_API_KEY"), timeout=60, check_compatibility=False
        ), name
    return QdrantClient(path=destination), COLLECTION


def _prepare(output: TaggedOutput, destination: str, with_images: bool) -> list[str]:
    try:
        import qdrant_client  # noqa: F401
    except ImportError as error:
        raise ConfigError("--to qdrant needs the package qdrant-client: pip install 'sightline[qdrant]'") from error
    if _is_server(destination):
        _check_collection(output, destination)
    return []


def _check_collection(output: TaggedOutput, destination: str) -> None:
    """Raise `ConfigError` if a server's collection cannot take the points, `StoreError` if it does not answer."""
    from qdrant_client.http.exceptions import ApiException
    from qdrant_client.models import Distance, FieldCondition, Filter, MatchValue, VectorParams

    client, name = _connect(destination)
    try:
        if not client.collection_exists(name):
            return
        vectors = client.get_collection(name).config.params.vectors
        wanted = VectorParams(size=output.width, distance=Distance.COSINE)
        if not isinstance(vectors, VectorParams) or (vectors.size, vectors.distance) != (wanted.size, wanted.distance):
            raise ConfigError(f"{destination}: the collection's vectors are not {wanted.size} numbers by cosine")
        own = FieldCondition(key=OUTPUT, match=MatchValue(value=output.uri))
        others, _ = client.scroll(name, scroll_filter=Filter(must_not=[own]), limit=1)
        if others:
            raise ConfigError(f"{destination} has points of something else than {output.uri}: name a new collection")
    except ApiException as error:
        raise _explain(destination, error) from error
    finally:
        client.close()


TARGET = Target("none", write, prepare=_prepare, remote=_is_server)
