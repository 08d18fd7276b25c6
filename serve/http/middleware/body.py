"""Reading a request's body, with limits."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.admission.controller import AdmissionController
from serve.config import EndpointLimits
from serve.context import LARGE, RequestContext
from serve.http.bodies.structure import check_structure
from serve.http.errors import ApiError
from serve.http.middleware.error_envelope import ClientGone
from serve.http.middleware.gzip_body import GzipUnpacker
from serve.http.middleware.request_context import get_context
from serve.http.quoting import quote


class BodyMiddleware:
    """Reads and unpacks the whole body, checks its size and structure, and then calls the route with it.

    It never holds more than `limits.body_bytes` of a body. Content-Encoding may be gzip or none.
    """

    def __init__(self, app: ASGIApp, limits: EndpointLimits, admission: AdmissionController) -> None:
        self._app = app
        self._limits = limits
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context, headers = get_context(scope), Headers(scope=scope)
        body = await self._read(headers, receive, context)
        context.body_received = True
        arguments = body, headers.get("content-type", ""), self._limits
        await context.work(check_structure, *arguments, size=len(body))
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive, context: RequestContext) -> bytes:
        """The whole body, unpacked. Raises `ApiError`, and `ClientGone` when the connection was closed."""
        limit = self._limits.body_bytes
        too_large = ApiError("body_too_large", f"the body has more than {limit} bytes: send fewer or smaller images")
        unpacker = _make_unpacker(", ".join(headers.getlist("content-encoding")))
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:  # Python refuses to read thousands of digits
            raise too_large
        chunks: list[bytes] = []
        packed = size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            packed += len(chunk)
            if packed > limit:  # of a gzip body too: blocks that unpack to nothing could go on forever
                raise too_large
            if unpacker is not None:
                last = not message.get("more_body", False)
                # In a thread: a few kilobytes may unpack to the whole limit, which takes tens of milliseconds.
                chunk = await context.work(unpacker.unpack, chunk, limit + 1 - size, last, size=LARGE)
            size += len(chunk)
            if size > limit:
                raise too_large
            self._admission.add_bytes(context.permit, len(chunk))
            chunks.append(chunk)
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _make_unpacker(encoding: str) -> GzipUnpacker | None:
    """An unpacker for a Content-Encoding, None for an unpacked body. Raises `ApiError` for an unknown encoding."""
    match encoding.strip().lower():
        case "" | "identity":
            return None
        case "gzip" | "x-gzip":
            return GzipUnpacker()
    raise ApiError("unsupported_media_type", f"Content-Encoding: send gzip or no encoding, not {quote(encoding)}")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns a body that was read already, and then the messages that come after it."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
