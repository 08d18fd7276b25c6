"""Names in Google's and Azure's stores: URIs to buckets and keys, with the rules of obstore for them."""

from __future__ import annotations

import re

from storage.store import InvalidUri, show

EXAMPLES = {"gs": "gs://bucket/prefix", "az": "az://container/prefix"}
_KEY_BYTES = 1024
_BUCKET = re.compile(r"[A-Za-z0-9.\-_$]{3,222}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def split_prefix(uri: str) -> tuple[str, str]:
    """Bucket, or container, and key, or key prefix, of a URI. The key may be empty, and has no slash at its end.

    Raises `InvalidUri` for a name that no store can hold, or that obstore cannot address: with an empty part, a part
    `.` or `..`, or a control character. It would be another object's name, or none.
    """
    scheme, _, name = uri.partition("://")
    bucket, _, key = name.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise InvalidUri(f"{show(uri)}: expected {EXAMPLES[scheme]}")
    key = key.rstrip("/")
    try:
        length = len(key.encode())
    except UnicodeEncodeError:
        raise InvalidUri(f"{show(uri)}: a name is UTF-8") from None
    if length > _KEY_BYTES:
        raise InvalidUri(f"{show(uri)}: a name has at most {_KEY_BYTES} bytes, this one {length}")
    if _CONTROL.search(key):
        raise InvalidUri(f"{show(uri)}: a name with control characters is not supported in {scheme}://")
    if key and any(part in ("", ".", "..") for part in key.split("/")):
        raise InvalidUri(f"{show(uri)}: a name with an empty part, or a part . or .., is not supported in {scheme}://")
    return bucket, key


def split_object(uri: str) -> tuple[str, str]:
    """Bucket and key of an object's URI. Raises `InvalidUri`, also for a bucket without a key, or a folder."""
    bucket, key = split_prefix(uri)
    if not key or uri.endswith("/"):
        raise InvalidUri(f"{show(uri)} names a {'folder' if key else 'bucket'}, not an object")
    return bucket, key
