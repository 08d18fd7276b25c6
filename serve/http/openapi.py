"""The OpenAPI schema of the API: what FastAPI makes of the routes, with the API keys and without what is never sent."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from serve.http.paths import is_open

SECURITY_SCHEMES: dict[str, dict[str, str]] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, as OpenAI's clients send it."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same API key."},
}
"""The two ways to send an API key; see `serve.http.middleware.authentication`. Either one is enough."""
READS = ("get", "head")


def add_openapi_route(app: FastAPI, has_keys: bool) -> None:
    """Add GET /openapi.json for the routes that `app` has now. With `has_keys`, they need an API key.

    The schema is written once: anyone may ask for it, and FastAPI's own route writes its 100 KB for each request.
    FastAPI's own response to invalid requests (422) is removed: this server sends 400 and the error envelope. A route
    that needs an API key says so, so that the page /docs has the button Authorize.
    """
    schema: dict[str, Any] = app.openapi()
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            operation["responses"].pop("422", None)
            if has_keys and not (method in READS and is_open(path)):
                operation["security"] = [{name: []} for name in SECURITY_SCHEMES]
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    if has_keys:
        schema["components"]["securitySchemes"] = SECURITY_SCHEMES
    body = json.dumps(schema, separators=(",", ":")).encode()

    @app.get("/openapi.json", include_in_schema=False)
    async def send_schema() -> Response:
        return Response(body, media_type="application/json")
