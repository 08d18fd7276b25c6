"""What must hold for web pages of other origins, whichever proxy is in front of the application."""

from __future__ import annotations

import httpx

ALLOWED = "https://app.example"
"""The origin in `cors.origins` of the endpoint under test."""


def check_cross_origin(client: httpx.Client) -> None:
    """Send preflights and requests as a browser does, for an allowed page and another."""

    def preflight(origin: str, method: str = "POST") -> httpx.Response:
        headers = {"access-control-request-method": method, "access-control-request-headers": "authorization"}
        return client.options("/v1/embeddings", headers={"origin": origin, **headers})

    allowed = preflight(ALLOWED)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ALLOWED
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    foreign, method = preflight("https://evil.example"), preflight(ALLOWED, "DELETE")
    assert "access-control-allow-origin" not in foreign.headers
    for refused in (foreign, method):
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed")
        assert "origin" in refused.headers["vary"].lower()
    without_origin = client.options("/v1/embeddings")
    assert (without_origin.status_code, without_origin.json()["error"]["code"]) == (405, "method_not_allowed")
    error = client.post("/v1/embeddings", json={}, headers={"origin": ALLOWED})
    assert error.status_code == 400
    assert error.headers["access-control-allow-origin"] == ALLOWED
    models = client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert models.status_code == 200
    assert "access-control-allow-origin" not in models.headers
