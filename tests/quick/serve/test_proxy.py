"""The middleware of Ray Serve's own proxy: its refusals are translated, the application's responses are not."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.responses import PlainTextResponse, Response

from serve.rayserve.proxy import Envelope

REFUSALS = {
    400: (400, "invalid_request"),
    404: (503, "unavailable"),
    405: (405, "method_not_allowed"),
    408: (429, "deadline_exceeded"),
    413: (413, "body_too_large"),
    414: (414, "invalid_request"),
    429: (429, "overloaded"),
    431: (431, "invalid_request"),
    499: (499, "invalid_request"),
    500: (500, "internal_error"),
    501: (501, "unavailable"),
    502: (503, "unavailable"),
    503: (503, "unavailable"),
    504: (503, "unavailable"),
}
"""Status and code of the endpoint's error by the status of the proxy's refusal."""


def respond(response: Response, path: str = "/v1/models") -> httpx.Response:
    """The response of a proxy whose application, or whose own refusal, is `response`."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(Envelope(response))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(send())


@pytest.mark.parametrize("status", REFUSALS)
def test_a_refusal_keeps_its_meaning(status: int) -> None:
    response = respond(PlainTextResponse("no", status, {"retry-after": "7"}))
    assert (response.status_code, response.json()["error"]["code"]) == REFUSALS[status]
    assert status != 429 or response.headers["retry-after"] == "7"


@pytest.mark.parametrize("status", [200, 400, 403, 404, 500, 503])
def test_a_response_of_the_application_passes_unchanged(status: int) -> None:
    response = respond(PlainTextResponse("mine", status, {"server-timing": "total;dur=1"}))
    assert (response.status_code, response.text) == (status, "mine")


def test_ray_serves_own_paths_pass_unchanged() -> None:
    response = respond(PlainTextResponse("draining", 503), path="/-/healthz")
    assert (response.status_code, response.text) == (503, "draining")
