"""A bucket in memory that answers listings, as text that a client of boto3 gets instead of a server's.

It counts requests, and can be made to list as servers do that are not S3. Tests of many shapes of buckets use it;
`tests/s3` lists the same shapes on a real server.
"""

from __future__ import annotations

import io
import threading
from bisect import bisect_left, bisect_right
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit
from xml.sax.saxutils import escape

from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from urllib3.response import HTTPResponse

from storage.s3.store import S3Store
from storage.store import StoreOptions


class MemoryBucket:
    """Keys that are listed in the given order, `page` for each request.

    With `ignores_start` the parameter StartAfter has no effect. With `fails_first`, each request gets that status when
    it is sent for the first time. A request whose number, from 0 on, is in `failing` gets that status, and a page that
    would list the key `forbidden` gets 403: which request has which number depends on the threads that ask. `requests`
    has the parameters of each request so far.
    """

    def __init__(self, keys: list[str], page: int = 1000, *, ignores_start: bool = False) -> None:
        self.keys = keys
        self.requests: list[dict[str, str]] = []
        self.failing: dict[int, int] = {}
        self.fails_first: int | None = None
        self.forbidden: str | None = None
        self.refuses_delimiter = False
        self._sorted = keys == sorted(keys)
        self._page = page
        self._ignores_start = ignores_start
        self._lock = threading.Lock()

    def open(self) -> S3Store:
        """A store whose requests this bucket answers, whatever the bucket's name."""
        store = S3Store(StoreOptions("http://127.0.0.1:9", "us-east-1"))
        store._client.meta.events.register("before-send.s3", self._answer)
        return store

    def _answer(self, request: AWSPreparedRequest, **_: Any) -> AWSResponse:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(request.url).query).items()}
        with self._lock:
            number, again = len(self.requests), asked in self.requests
            self.requests.append(asked)
        status = self.failing.get(number, 200) if again or self.fails_first is None else self.fails_first
        if self.refuses_delimiter and "delimiter" in asked:
            status = 403
        body = self._list(asked) if status == 200 else ""
        # A probe for folders may be refused and the listing goes on; pages may not.
        if self.forbidden and "delimiter" not in asked and f"<Key>{quote(self.forbidden)}</Key>" in body:
            status = 403
        if status != 200:
            body = "<Error><Code>AccessDenied</Code></Error>"
        raw = HTTPResponse(io.BytesIO(body.encode()), preload_content=False)
        return AWSResponse(request.url, status, {"Content-Type": "application/xml"}, raw)

    def _list(self, asked: dict[str, str]) -> str:
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter")
        position, after = 0, None if self._ignores_start else asked.get("start-after")
        if "continuation-token" in asked:
            position, after = int(asked["continuation-token"]), None
        elif self._sorted:
            position = max(bisect_left(self.keys, prefix), bisect_right(self.keys, after or ""))
        items: list[str] = []
        folder = None
        while position < len(self.keys):
            key = self.keys[position]
            if not key.startswith(prefix) or (after is not None and key <= after):
                if self._sorted and key > prefix and not key.startswith(prefix):
                    position = len(self.keys)
                    break
                position += 1
                continue
            slash = key.find(delimiter, len(prefix)) if delimiter else -1
            if slash < 0 or key[: slash + 1] != folder:
                if len(items) == min(self._page, int(asked.get("max-keys", self._page))):
                    break
                folder = key[: slash + 1] if slash >= 0 else None
                name = quote(folder or key, safe="/")
                items.append(
                    f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>"
                    if folder
                    else f"<Contents><Key>{name}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
                    f"<ETag>&quot;{position:032x}&quot;</ETag><Size>{position + 1}</Size>"
                    "<StorageClass>STANDARD</StorageClass></Contents>"
                )
            position += 1
        truncated = position < len(self.keys) and any(key.startswith(prefix) for key in self.keys[position:])
        token = f"<NextContinuationToken>{position}</NextContinuationToken>" if truncated else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>bucket</Name><Prefix>{escape(quote(prefix))}</Prefix><EncodingType>url</EncodingType>"
            f"<IsTruncated>{str(truncated).lower()}</IsTruncated>{token}{''.join(items)}</ListBucketResult>"
        )
