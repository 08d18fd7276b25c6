"""A stand-in for Google Cloud Storage on loopback: the part of its XML API that obstore uses, with objects in memory.

No emulator with this API can be installed from PyPI, npm or Debian. It was written after Google's reference of the XML
API: conditional writes by `x-goog-if-generation-match`, ranges, listings and uploads in parts.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import uuid
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_PAGE = 1000
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class _Bucket:
    objects: dict[str, tuple[bytes, str]] = field(default_factory=dict)  # the content and its ETag
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)


class GoogleServer:
    """A running server. `stop` ends it."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def env(self) -> dict[str, str]:
        """The environment variables that a client needs."""
        return make_env(self.endpoint)

    def new_bucket(self) -> str:
        """Make an empty bucket, and return its name."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self._buckets[name] = _Bucket()
        return name

    def stop(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()

    def respond(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return the status, headers and body for a request."""
        parts = urlsplit(request.path)
        name, _, key = parts.path.lstrip("/").partition("/")
        query = {one: values[0] for one, values in parse_qs(parts.query, keep_blank_values=True).items()}
        bucket = self._buckets.get(unquote(name))
        if bucket is None:
            return 404, {}, b"<Error><Code>NoSuchBucket</Code></Error>"
        with self._lock:
            if not key:
                return 200, {}, _list(bucket, query)
            return _handle(bucket, unquote(key), query, request, body)


def make_env(endpoint: str) -> dict[str, str]:
    """The environment variables of a client of a server at this address."""
    account = {"gcs_base_url": endpoint, "disable_oauth": True}
    account |= {"client_email": "", "private_key": "", "private_key_id": ""}
    return {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account)}


def _handle(
    bucket: _Bucket, key: str, query: dict[str, str], request: BaseHTTPRequestHandler, body: bytes
) -> tuple[int, dict[str, str], bytes]:
    upload = query.get("uploadId", "")
    match request.command:
        case "POST" if "uploads" in query:
            upload = uuid.uuid4().hex
            bucket.uploads[upload] = {}
            tag = "InitiateMultipartUploadResult"
            return 200, {}, f"<{tag}><UploadId>{upload}</UploadId></{tag}>".encode()
        case "PUT" if upload:
            bucket.uploads[upload][int(query["partNumber"])] = body
            return 200, {"ETag": _make_etag(body)}, b""
        case "DELETE" if upload:
            bucket.uploads.pop(upload, None)
            return 204, {}, b""
        case "POST":
            parts = bucket.uploads.pop(upload)
            body = b"".join(parts[number] for number in sorted(parts))
            bucket.objects[key] = body, _make_etag(body)
            tag = "CompleteMultipartUploadResult"
            return 200, {}, f"<{tag}><ETag>{escape(_make_etag(body))}</ETag></{tag}>".encode()
        case "PUT":
            if request.headers.get("x-goog-if-generation-match") == "0" and key in bucket.objects:
                return 412, {}, b"<Error><Code>PreconditionFailed</Code></Error>"
            bucket.objects[key] = body, _make_etag(body)
            return 200, {"ETag": _make_etag(body), "x-goog-generation": "1"}, b""
    if key not in bucket.objects:
        return 404, {}, b"<Error><Code>NoSuchKey</Code></Error>"
    if request.command == "DELETE":
        del bucket.objects[key]
        return 204, {}, b""
    return _send(*bucket.objects[key], request)


def _send(data: bytes, etag: str, request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
    if request.headers.get("If-Match", etag) != etag:
        return 412, {}, b"<Error><Code>PreconditionFailed</Code></Error>"
    headers = {"ETag": etag, "Last-Modified": formatdate(0, usegmt=True)}
    wanted = _RANGE.fullmatch(request.headers.get("Range", ""))
    if wanted is None:
        return 200, headers, data
    start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
    if start >= len(data):
        return 416, {}, b"<Error><Code>InvalidRange</Code></Error>"
    return 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]


def _list(bucket: _Bucket, query: dict[str, str]) -> bytes:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = query.get("continuation-token") or query.get("start-after", "")
    entries: list[str] = []
    folders: set[str] = set()
    token = ""
    for key in sorted(bucket.objects):
        if not key.startswith(prefix) or key <= after:
            continue
        folder, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
        if cut:
            folders.add(prefix + folder + cut)
            continue
        data, etag = bucket.objects[key]
        fields = {"Key": key, "Size": len(data), "ETag": etag, "LastModified": "2026-01-01T00:00:00.000Z"}
        entries.append("".join(f"<{tag}>{escape(str(value))}</{tag}>" for tag, value in fields.items()))
        if len(entries) == _PAGE:
            token = f"<NextContinuationToken>{escape(key)}</NextContinuationToken>"
            break
    contents = "".join(f"<Contents>{one}</Contents>" for one in entries)
    common = "".join(f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in sorted(folders))
    about = f"<IsTruncated>{str(bool(token)).lower()}</IsTruncated><KeyCount>{len(entries)}</KeyCount>"
    return f"<ListBucketResult>{about}{contents}{common}{token}</ListBucketResult>".encode()


def _make_etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _make_handler(server: GoogleServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, content = server.respond(self, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler
