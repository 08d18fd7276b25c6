"""The OpenAPI schema of the API: what FastAPI makes of the routes, with the API keys and without what is never sent."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from serve.http.paths import is_open

SECURITY_SCHEMES: dict[str, dict[str, str]] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, as OpenAI's clients send it."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same API key."},
}
"""The two ways to send an API key; see `serve.http.middleware.authentication`. Either one is enough."""
READS = ("get", "head")


def complete_openapi(app: FastAPI, has_keys: bool) -> None:
    """Complete the schema, which FastAPI makes once and keeps. With `has_keys`, routes need an API key.

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
