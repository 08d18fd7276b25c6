"""Headers that Ray Serve reads before the endpoint does."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Receive, Scope, Send

from serve.rayserve.proxy import middlewares
from serve.rayserve.request_headers import RequestHeaders


def pass_on(*headers: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """The headers that Ray Serve gets."""
    seen: list[tuple[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])

    async def nothing(*_: object) -> None:
        return None

    scope = {"type": "http", "headers": list(headers)}
    asyncio.run(RequestHeaders(app)(scope, nothing, nothing))  # type: ignore[arg-type]
    return seen


@pytest.mark.parametrize("given", [b"x" * 129, b"", b"a b", b"\xff", "é".encode(), b"a\x80"])
def test_ray_serve_never_sees_a_request_id_that_it_would_repeat(given: bytes) -> None:
    assert pass_on((b"x-request-id", given), (b"accept", b"*/*")) == [(b"accept", b"*/*")]


def test_ray_serve_never_sees_a_header_that_it_cannot_decode() -> None:
    kept = [
        (b"x-request-id", b"abc-1"),
        (b"authorization", b"Bearer \xe9"),
        (b"x", "é".encode()),
        (b"content-type", b"\xff"),
    ]
    assert pass_on(*kept, (b"serve_multiplexed_model_id", b"\xff"), (b"X-Request-Timeout-Seconds", b"\xff")) == kept


def test_a_proxy_checks_the_headers_first() -> None:
    assert [getattr(middleware.cls, "__name__", "") for middleware in middlewares()] == ["RequestHeaders", "Envelope"]
