"""What stands before every route: keys, rates, admission, the body's size, the deadline; and after it the headers,
metrics and log line. One ASGI middleware, so that whatever goes wrong inside it is answered in one envelope."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
import zlib
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.admission.auth import KeyRing, RateLimiter
from serve.admission.batcher import Expired
from serve.admission.controller import Permit
from serve.context import RequestContext
from serve.http.bodies import check_structure
from serve.http.errors import ApiError
from serve.log import log
from serve.rayserve.haproxy import PEER
from serve.service import Service

OPEN_PATHS = ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/health")
OPEN_PREFIXES = ("/playground/", "/docs/")
"""What a GET may read without a key: the page, the documentation, health. Nobody sends a body there."""
HEALTH_PATHS = ("/healthz", "/readyz", "/health")
REQUEST_ID = "x-request-id"
TIMEOUT = "x-request-timeout-seconds"
"""Ray Serve's own header: its proxy gives up when that time has passed, and so must this server, a little earlier."""
EARLIER = 0.95
CLIENT_GONE = 499
"""nginx's status for a client that did not wait: for the log and the metrics."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_SANE_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Middleware:
    """Wraps the routes. It reads the whole body before them, so that what they wait for is never a slow client."""

    def __init__(self, app: ASGIApp, service: Service, keys: KeyRing | None, behind_haproxy: bool) -> None:
        self.app = app
        self.behind_haproxy = behind_haproxy
        self.service = service
        self.keys = keys
        per_minute = service.config.auth.requests_per_minute
        self.rates = RateLimiter(per_minute) if per_minute else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID)
        named = given is not None and _SANE_ID.fullmatch(given) is not None
        context = RequestContext(given if given and named else uuid.uuid4().hex, Permit(0.0))
        answer = _Answer(send, context, self.service, add_id=not named)
        status: int | None = None
        try:
            await self._handle(scope, headers, receive, answer, context)
        except ApiError as error:
            await answer.refuse(error)
        except Expired:
            await answer.refuse(self._too_late(context))
        except _ClientGone:
            status = CLIENT_GONE
        except asyncio.CancelledError:
            status = CLIENT_GONE
            raise
        except Exception:
            log.exception("internal error", extra={"request_id": context.request_id})
            await answer.refuse(ApiError("internal_error", f"internal error; its request id is {context.request_id}"))
        finally:
            self._record(scope, context, status or answer.status)

    async def _handle(
        self, scope: Scope, headers: Headers, receive: Receive, answer: _Answer, context: RequestContext
    ) -> None:
        path: str = scope["path"]
        reading = scope["method"] in ("GET", "HEAD")
        if not (reading and path in HEALTH_PATHS):
            context.key = self._authenticate(scope, headers, open_to_all=reading and _is_open(path))
        scope.setdefault("state", {})["context"] = context
        if reading:
            await self.app(scope, receive, answer)
            return
        if context.key is not None and self.rates is not None:
            quota = context.quotas["requests"] = self.rates.check(context.key)
            if not quota.allowed:
                raise ApiError(
                    "rate_limit_exceeded",
                    f"this key may send {quota.limit} requests a minute; come back in {quota.retry_after_s:.1f} s",
                    retry_after=quota.retry_after_s,
                )
        seconds = _read_timeout(headers, self.service.config.limits.deadline_s)
        whole = False
        with self.service.admission.admit(seconds, context.key if self.keys else None) as context.held:
            try:
                async with asyncio.timeout(seconds):
                    body = await self._read_body(headers, receive, context.held)
                    whole = True
                    check_structure(body, headers.get("content-type", ""), self.service.config.limits)
                    await self.app(scope, _replay(body, receive), answer)
            except TimeoutError:
                if not whole:
                    raise ApiError("body_timeout", f"the body did not arrive within {seconds:g} s") from None
                raise self._too_late(context) from None

    def _authenticate(self, scope: Scope, headers: Headers, open_to_all: bool) -> str | None:
        """The name of the request's key, or None where none is needed. Raises `ApiError`."""
        if self.keys is None:
            if not _is_local(scope, headers, self.behind_haproxy):
                raise ApiError(
                    "loopback_only",
                    "no API keys are configured, so only clients on this machine are answered: set auth.keys_file",
                )
            return "anonymous"
        if open_to_all:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        name = self.keys.verify(token) if token else None
        if name is None:
            what = "this API key is not known" if token else "send an API key: Authorization: Bearer KEY"
            raise ApiError("invalid_api_key", what)
        return name

    async def _read_body(self, headers: Headers, receive: Receive, held: Permit) -> bytes:
        """The whole body. Raises `ApiError` when it is too large; no more than the limit is ever held."""
        limit = self.service.config.limits.body_bytes
        too_large = ApiError("body_too_large", f"the body has more than {limit} bytes: send fewer or smaller images")
        unpack = _unpacker(headers.get("content-encoding", ""))
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _ClientGone
            chunk = message.get("body", b"")
            if unpack is not None:
                last = not message.get("more_body", False)
                # A few kilobytes may unpack to all that is allowed, which takes tens of milliseconds.
                chunk = await asyncio.to_thread(_unpack, unpack, chunk, limit + 1 - size, last)
            size += len(chunk)
            if size > limit:
                raise too_large
            self.service.admission.add_bytes(held, len(chunk))
            chunks.append(chunk)
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _too_late(self, context: RequestContext) -> ApiError:
        waited = time.monotonic() - context.started
        message = f"the answer was not ready after {waited:.1f} s: try again later"
        if context.stages == {} and context.texts > 1:
            message += ", or have the label set registered in label_sets"
        return ApiError("deadline_exceeded", message, retry_after=self.service.admission.retry_after())

    def _record(self, scope: Scope, context: RequestContext, status: int) -> None:
        seconds = time.monotonic() - context.started
        route = getattr(scope.get("route"), "path", "unmatched")
        metrics = self.service.metrics
        metrics.record_request(route, status, context.code, seconds)
        metrics.record_stages(context.stages)
        if scope["path"] in HEALTH_PATHS and status == 200:
            return
        log.info(
            "%s %s %d",
            scope["method"],
            route,
            status,
            extra={
                "request_id": context.request_id,
                "key": context.key,
                "code": context.code,
                "ms": round(seconds * 1000, 2),
                "images": context.images,
                "texts": context.texts,
                "bytes": context.held.load.bytes,
                "stages_ms": {stage: round(value * 1000, 2) for stage, value in context.stages.items()},
            },
        )


class _ClientGone(Exception):
    """The client closed the connection before its body was whole."""


class _Answer:
    """`send` for the routes: adds the headers that every answer carries, and knows whether one has begun."""

    def __init__(self, send: Send, context: RequestContext, service: Service, add_id: bool) -> None:
        self._send = send
        self._context = context
        self._service = service
        self._add_id = add_id
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._add_headers(MutableHeaders(scope=message))
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Send an error, unless an answer has begun."""
        if self.status:
            return
        self._context.code = error.code
        for message in error.messages():
            await self(message)

    def _add_headers(self, headers: MutableHeaders) -> None:
        context = self._context
        if self._add_id:  # else Ray Serve's proxy, which gave the request its id, tells it
            headers[REQUEST_ID] = context.request_id
        total = time.monotonic() - context.started
        stages = {**context.stages, "total": total}
        headers["server-timing"] = ", ".join(f"{name};dur={value * 1000:.2f}" for name, value in stages.items())
        about = getattr(self._service, "about", None)
        if about is not None:
            headers["x-sightline-model"] = about.weights
        if context.labels_digest is not None:
            headers["x-sightline-labels"] = context.labels_digest
        for unit, quota in context.quotas.items():
            for name, value in quota.headers(unit).items():
                headers[name] = value


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)


@lru_cache(maxsize=1024)
def _is_loopback(peer: str) -> bool:
    try:
        return ip_address(peer).is_loopback
    except ValueError:
        return False


def _is_local(scope: Scope, headers: Headers, behind_haproxy: bool) -> bool:
    """Whether a request comes from this machine itself, and was meant for it.

    A page on the internet can make a browser send requests here under a name of its own that resolves to loopback: so
    the name is checked too. A request that a proxy passed on is a stranger's, but for Ray Serve's own HAProxy, which
    tells whose connection it was.
    """
    client = scope.get("client")
    peers = [client[0] if client else "", *(headers.getlist(PEER) or [""] if behind_haproxy else [])]
    if not all(map(_is_loopback, peers)):
        return False
    host = headers.get("host", "")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    forwarded = any(name in headers for name in ("forwarded", "x-forwarded-for", "x-real-ip"))
    return name.lower() in LOCAL_HOSTS and not forwarded


def _read_timeout(headers: Headers, most: float) -> float:
    """Seconds for a request: the configured ones, or fewer if it asks for fewer."""
    try:
        asked = float(headers.get(TIMEOUT, "")) * EARLIER
    except ValueError:
        return most
    return min(most, asked) if asked > 0 else most


def _unpacker(encoding: str) -> Any:
    """What unpacks a body; None if it is as it is. Raises `ApiError` for an encoding that is not known here."""
    match encoding.strip().lower():
        case "" | "identity":
            return None
        case "gzip" | "x-gzip":
            return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    raise ApiError("unsupported_media_type", f"Content-Encoding: send gzip, or nothing packed, not {encoding[:40]!r}")


def _unpack(unpack: Any, chunk: bytes, most: int, last: bool) -> bytes:
    """What a chunk unpacks to, and no more than `most` of it. Raises `ApiError`."""
    try:
        unpacked: bytes = unpack.decompress(chunk, most)
    except zlib.error:
        raise ApiError("invalid_request", "the body is not gzip, as Content-Encoding says it is") from None
    if last and len(unpacked) < most and not unpack.eof:
        raise ApiError("invalid_request", "the body's gzip ends early")
    return unpacked


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, and then what comes after it."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
