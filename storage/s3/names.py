"""Names in S3: URIs to buckets and keys, with the rules that every S3 server has for them."""

from __future__ import annotations

import re

from storage.store import InvalidUri, show

_KEY_BYTES = 1024
_BUCKET = re.compile(r"[A-Za-z0-9.\-_]{1,255}")
_ACCESS_POINT = re.compile(
    r"arn:[a-z0-9-]+:s3(?:-object-lambda)?:[a-z0-9-]*:\d{12}:accesspoint[:/][A-Za-z0-9.-]+"
    r"|arn:[a-z0-9-]+:s3-outposts:[a-z0-9-]+:\d{12}:outpost[:/][A-Za-z0-9-]+[:/]accesspoint[:/][A-Za-z0-9-]+"
)
"""The ARN of an access point, which stands in place of a bucket: also one for several regions, on Outposts, or with a
Lambda function for objects. Its parts may be separated by slashes, so it does not end at the first one."""


def split_prefix(uri: str) -> tuple[str, str]:
    """Bucket and key, or key prefix, of a URI. The key may be empty.

    Raises `InvalidUri` for a name that no S3 account can hold.
    """
    name = uri.removeprefix("s3://")
    start = found.end() if (found := _ACCESS_POINT.match(name)) else 0
    rest, _, key = name[start:].partition("/")
    bucket = name[:start] + rest
    if not bucket:
        raise InvalidUri(f"{show(uri)}: expected s3://bucket/prefix")
    if bucket.startswith("arn:") and (rest or not start):
        raise InvalidUri(
            f"{show(uri)}: expected the ARN of an access point, such as "
            "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/name/prefix; a bucket is written s3://bucket/prefix"
        )
    if not start and not _BUCKET.fullmatch(bucket):
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
