"""Uploads in parts, for objects that are too large for one request.

S3 takes at most 5 GiB in a request, and 10,000 parts of at least 5 MiB. Conditional writes are not made in parts: some
servers ignore the condition when an upload is completed, and replace the object (seen with Ceph 16.2). Their content
is small, because plan files are bounded too (`pipelines.planning.packing.SEGMENT_BYTES`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import IO, Any, TypeVar

from storage.store import NotFound, StoreError

UPLOAD_BYTES = 2**30
"""Objects over this size are uploaded in parts."""
PART_BYTES = 64 * 2**20
"""The size of a part, at least. One part is held in memory."""
_PARTS = 10_000

T = TypeVar("T")


def upload_parts(
    client: Any, retry: Callable[[Callable[[], T]], T], bucket: str, key: str, data: IO[bytes], size: int
) -> None:
    """Upload `size` bytes of a file from its first byte on, in parts, each of which `retry` may send again.

    A failed upload is aborted, so that its parts cost nothing. The parts of a killed process stay until the bucket's
    lifecycle rule for incomplete uploads removes them. Raises `StoreError`.
    """
    names = {"Bucket": bucket, "Key": key}
    upload: Any = retry(lambda: client.create_multipart_upload(**names))
    names["UploadId"] = upload["UploadId"]
    part_bytes = max(PART_BYTES, -(-size // _PARTS))
    parts: list[dict[str, Any]] = []
    try:
        data.seek(0)
        while piece := data.read(part_bytes):
            part = {**names, "PartNumber": len(parts) + 1, "Body": piece}
            sent: Any = retry(partial(client.upload_part, **part))
            parts.append({"PartNumber": part["PartNumber"], "ETag": sent["ETag"]})
        # `NotFound`: an earlier attempt completed the upload, and its response was lost. The caller checks the object.
        with contextlib.suppress(NotFound):
            retry(lambda: client.complete_multipart_upload(**names, MultipartUpload={"Parts": parts}))
    except StoreError:
        with contextlib.suppress(StoreError):
            retry(lambda: client.abort_multipart_upload(**names))
        raise
