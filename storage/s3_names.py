"""Names in S3: URIs to buckets and keys, with the rules that every S3 server has for them."""

from __future__ import annotations

import re

from storage.store import InvalidUri, show

_KEY_BYTES = 1024
_BUCKET = re.compile(r"[A-Za-z0-9.\-_]{1,255}|arn:[\x21-\x7e]+")


def split_prefix(uri: str) -> tuple[str, str]:
    """Bucket and key, or key prefix, of a URI. The key may be empty.

    Raises `InvalidUri` for a name that no S3 account can hold.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise InvalidUri(f"{show(uri)}: expected s3://bucket/prefix")
    if not _BUCKET.fullmatch(bucket):
        raise InvalidUri(f"{show(uri)}: no bucket can have this name")
    try:
        length = len(key.encode())
    except UnicodeEncodeError:
        raise InvalidUri(f"{show(uri)}: a key is UTF-8") from None
    if length > _KEY_BYTES:
        raise InvalidUri(f"{show(uri)}: a key has at most {_KEY_BYTES} bytes, this one {length}")
    if "\0" in key:
        raise InvalidUri(f"{show(uri)}: a key has no NUL")
    depth = 0
    for name in key.split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(name, 1)
        if depth < 0:
            raise InvalidUri(f"{show(uri)}: its .. lead out of the bucket")
    return bucket, key


def split_object(uri: str) -> tuple[str, str]:
    """Bucket and key of an object's URI. Raises `InvalidUri`, also for a bucket without a key."""
    bucket, key = split_prefix(uri)
    if not key:
        raise InvalidUri(f"{show(uri)} names a bucket, not an object")
    return bucket, key
