"""An HTTP proxy on loopback that forwards requests to an object store, and injects the faults that a test defines.

A rule selects requests (by method, by a regular expression over `bucket/key`, by count) and has an action for them. The
first rule that matches a request is applied. A request without a rule is forwarded unchanged. The Host header is
forwarded too, so that the server accepts signatures that a client made for the proxy's address.

The proxy does not support TLS, chunked request bodies or HTTP/2.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_PIECE = 1 << 16
_HOP_BY_HOP = frozenset(("connection", "keep-alive", "transfer-encoding", "content-length"))


@dataclass(frozen=True)
class ErrorResponse:
    """Respond with an error. With `passed` the server handles the request first, and only its response is lost."""

    status: int
    code: str
    passed: bool = False


@dataclass(frozen=True)
class Reset:
    """Reset the connection after `after` bytes of the body, or before the response if `after` is None."""

    after: int | None = None


@dataclass(frozen=True)
class CutShort:
    """End the body after `after` bytes.

    The proxy closes the connection there; with `lying` it sends `after` as the Content-Length instead.
    """

    after: int
    lying: bool = False


@dataclass(frozen=True)
class Silence:
    """Send nothing for `seconds`, then continue.

    The pause is after `after` bytes of the body, or before the response.
    """

    seconds: float
    after: int | None = None


@dataclass(frozen=True)
class Trickle:
    """Send the body slowly, at this rate."""

    bytes_per_second: int


@dataclass(frozen=True)
class Do:
    """Call a function with the request's `bucket/key`, then forward the request."""

    function: Callable[[str], object]


CONDITIONS = ("If-None-Match", "x-goog-if-generation-match")
"""The headers of a conditional write: in S3 and Azure, and in Google's store."""

Action = ErrorResponse | Reset | CutShort | Silence | Trickle | Do

FAILS = ErrorResponse(500, "InternalError")
SLOW_DOWN = ErrorResponse(503, "SlowDown")
FORBIDDEN = ErrorResponse(403, "AccessDenied")
ARCHIVED = ErrorResponse(403, "InvalidObjectState")
ABSENT = ErrorResponse(404, "NoSuchKey")
CONFLICT = ErrorResponse(409, "ConditionalRequestConflict")
PRECONDITION = ErrorResponse(412, "PreconditionFailed")
DONE_BUT_FAILS = ErrorResponse(500, "InternalError", passed=True)


@dataclass
class Rule:
    """Which requests get a fault, and which fault.

    `method` is an HTTP method, or LIST for a listing, whose key is its prefix; several are separated by `|`. `key` is a
    regular expression over `bucket/key`. The first `skip` matching requests are forwarded, the next `times` get the
    fault; `times=None` means all until `stop`. With `each`, requests are counted for each key apart. With
    `conditional`, only writes with one of `CONDITIONS` match. With `once`, the rule begins after a request whose method
    and `bucket/key`, separated by a blank, match that regular expression. `done` counts the requests that got the
    fault.
    """

    action: Action
    method: str
    key: str
    times: int | None
    skip: int
    each: bool
    conditional: bool
    once: str | None
    done: int = 0
    matched: Counter[str] = field(default_factory=Counter)

    def takes(self, method: str, key: str, conditional: bool) -> bool:
        """Count a request, and return whether it gets the fault."""
        if (
            self.once is not None
            or self.times == 0
            or method not in self.method.split("|")
            or not re.search(self.key, key)
        ):
            return False
        if self.conditional and not conditional:
            return False
        counted = key if self.each else ""
        number = self.matched[counted]
        if self.times is not None and number >= self.skip + self.times:
            return False
        self.matched[counted] += 1
        if number < self.skip:
            return False
        self.done += 1
        return True

    def see(self, method: str, key: str) -> None:
        """Begin the rule if this is the request that `once` describes."""
        if self.once is not None and re.search(self.once, f"{method} {key}"):
            self.once = None

    def stop(self) -> None:
        """End the rule: no further request gets the fault."""
        self.times = 0


class FaultProxy:
    """The proxy, which listens from its construction on.

    `requests` has method and `bucket/key` of each request so far.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.rules: list[Rule] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self._server = _Server(self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def add(
        self,
        action: Action,
        key: str = "",
        *,
        method: str = "GET",
        times: int | None = 1,
        skip: int = 0,
        each: bool = False,
        conditional: bool = False,
        once: str | None = None,
    ) -> Rule:
        """Add a rule for the requests from now on. Returns the rule, which counts its faults."""
        rule = Rule(action, method, key, times, skip, each, conditional, once)
        with self.lock:
            self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Remove all rules, and forget the requests so far."""
        with self.lock:
            self.rules.clear()
            self.requests.clear()

    def find(self, method: str, key: str, conditional: bool) -> Action | None:
        """Count a request, and return the action of the first rule that matches it, or None."""
        with self.lock:
            self.requests.append((method, key))
            for rule in self.rules:  # every rule sees every request, because of `once`
                rule.see(method, key)
            return next((rule.action for rule in self.rules if rule.takes(method, key, conditional)), None)

    def stop(self) -> None:
        """Stop listening, and end all pauses of `Silence`."""
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self.aborted: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def shutdown_request(self, request: Any) -> None:
        if request in self.aborted:  # without a FIN before it: closing with a linger of 0 sends a RST
            self.aborted.discard(request)
            request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients that disconnect are part of these tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection(self.server.proxy.upstream, timeout=120)

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def log_message(self, *_: Any) -> None:
        """Print nothing: `FaultProxy.requests` has the requests."""

    def _serve(self) -> None:
        split = urlsplit(self.path)
        query = parse_qs(split.query, keep_blank_values=True)
        method, key = self.command, unquote(split.path).removeprefix("/")
        if method == "GET" and ("list-type" in query or query.get("comp") == ["list"]):
            method, key = "LIST", f"{key.rstrip('/')}/{query.get('prefix', [''])[0]}"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        action = self.server.proxy.find(method, key, any(name in self.headers for name in CONDITIONS))
        if isinstance(action, ErrorResponse):
            if action.passed:
                self._forward(body).read()
            self._send_error(action)
        elif action == Reset():
            self._abort()
        else:
            if isinstance(action, Do):
                action.function(key)
            if isinstance(action, Silence) and action.after is None:
                self.server.proxy.stopping.wait(action.seconds)
            self._relay(self._forward(body), action)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815

    def _forward(self, body: bytes) -> http.client.HTTPResponse:
        for last in (False, True):
            try:
                self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        self.upstream.putheader(name, value)
                self.upstream.endheaders(body or None)
                return self.upstream.getresponse()
            except (http.client.HTTPException, OSError):  # the server closed an idle connection
                self.upstream.close()
                if last:
                    raise
        raise AssertionError("not reached")

    def _send_error(self, error: ErrorResponse) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{error.code}</Code><Message>a fault</Message></Error>".encode()
        self.send_response(error.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", "0" if self.command == "HEAD" else str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _relay(self, response: http.client.HTTPResponse, action: Action | None) -> None:
        length = response.getheader("Content-Length")
        pieces: Iterator[bytes] = iter(lambda: response.read(_PIECE), b"")
        # A chunked response has no known length.
        if length is None and self.command != "HEAD" and response.status != 204:
            whole = response.read()
            length, pieces = str(len(whole)), iter([whole])
        if isinstance(action, CutShort) and action.lying and length is not None:
            length = str(min(int(length), action.after))
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", length)
        self.end_headers()
        sent = 0
        for piece in pieces:
            after = getattr(action, "after", None)
            if after is not None and sent <= after < sent + len(piece):
                self.wfile.write(piece[: after - sent])
                if not isinstance(action, Silence):
                    self._stop(response, isinstance(action, Reset))
                    return
                self.server.proxy.stopping.wait(action.seconds)
                piece = piece[after - sent :]
                sent = after
            if isinstance(action, Trickle):
                self._trickle(piece, action.bytes_per_second)
            else:
                self.wfile.write(piece)
            sent += len(piece)

    def _trickle(self, piece: bytes, rate: int) -> None:
        step = max(1, rate // 20)
        for start in range(0, len(piece), step):
            self.wfile.write(piece[start : start + step])
            self.server.proxy.stopping.wait(step / rate)

    def _stop(self, response: http.client.HTTPResponse, reset: bool) -> None:
        """Close both connections. After a `lying` response too: the server has not sent the rest of the body yet."""
        response.close()
        self.close_connection = True
        if reset:
            self._abort()

    def _abort(self) -> None:
        self.close_connection = True
        self.server.aborted.add(self.connection)


@contextlib.contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Run a proxy in front of an S3 server until the `with` block ends."""
    proxy = FaultProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.stop()
