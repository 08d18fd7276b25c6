"""Who may send a request: a known API key or, where no keys are configured, a client on this machine."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.admission.auth import KeyRing
from serve.http.errors import ApiError
from serve.http.middleware.request_context import get_context
from serve.http.paths import HEALTH_PATHS, is_open, is_read
from serve.rayserve.haproxy import PEER

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
"""Host headers of requests that are meant for this machine."""


class AuthenticationMiddleware:
    """Sets the context's `key`, or refuses the request. Health checks need neither a key nor a loopback client.

    With keys, a GET of an open path needs none (see `serve.http.paths`), and its `key` stays None. Without keys every
    loopback client is named `anonymous`, and all others are refused.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None, behind_haproxy: bool) -> None:
        self._app = app
        self._keys = keys
        self._behind_haproxy = behind_haproxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, read = scope["path"], is_read(scope["method"])
        if not (read and path in HEALTH_PATHS):
            get_context(scope).key = self._authenticate(scope, needs_key=not (read and is_open(path)))
        await self._app(scope, receive, send)

    def _authenticate(self, scope: Scope, needs_key: bool) -> str | None:
        """The name of the request's key, or None where none is needed. Raises `ApiError`."""
        headers = Headers(scope=scope)
        if self._keys is None:
            if not _is_local(scope, headers, self._behind_haproxy):
                raise ApiError(
                    "loopback_only",
                    "no API keys are configured, so only clients on this machine are accepted: set auth.keys_file",
                )
            return "anonymous"
        if not needs_key:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        name = self._keys.verify(token) if token else None
        if name is None:
            message = "this API key is not known" if token else "send an API key: Authorization: Bearer KEY"
            raise ApiError("invalid_api_key", message)
        return name


def _is_local(scope: Scope, headers: Headers, behind_haproxy: bool) -> bool:
    """Whether a request was sent by a client on this machine, and was meant for this machine.

    The Host header is checked too, because of DNS rebinding: a page on the internet can make a browser send requests to
    a name of the page's own that resolves to loopback. A request that a proxy has forwarded is not local. Ray Serve's
    own HAProxy is the exception: it adds a header with the address of the client whose request it forwards.
    """
    client = scope.get("client")
    peers = [client[0] if client else "", *(headers.getlist(PEER) or [""] if behind_haproxy else [])]
    if not all(map(_is_loopback, peers)):
        return False
    host = headers.get("host", "")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    forwarded = any(name in headers for name in ("forwarded", "x-forwarded-for", "x-real-ip"))
    return name.lower() in LOCAL_HOSTS and not forwarded


@lru_cache(maxsize=1024)
def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False
