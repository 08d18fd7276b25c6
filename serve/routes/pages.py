"""What is not the API: the page at `/`, its documentation, and health."""

from __future__ import annotations

import time
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

from serve.http.responses import PydanticResponse, documented
from serve.schemas import Health
from serve.service import Service

PLAYGROUND = Path(__file__).parents[1] / "playground"
READY_SECONDS = 1.0
"""For how long an answer of `/readyz` holds: probing it costs the model next to nothing."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads nothing from elsewhere, and nothing that was smuggled into it runs."""
DOCS_POLICY = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
"""Swagger UI styles what it draws in place."""
SWAGGER_UI = str(files("fastapi_offline") / "static")
"""Swagger UI's files. FastAPI's own page would load them from a host on the internet, which a cluster may not reach."""


def add_pages(app: FastAPI, service: Service) -> None:
    """Register the routes."""
    checked = 0.0

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return _send_page("index.html", POLICY)

    @app.get("/docs", include_in_schema=False)
    async def reference() -> Response:
        return _send_page("docs.html", DOCS_POLICY)

    app.mount("/docs/ui", StaticFiles(directory=SWAGGER_UI), name="swagger-ui")
    app.mount("/playground", StaticFiles(directory=PLAYGROUND, check_dir=False), name="playground")

    @app.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)  # where other servers have it
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", response_model=Health, tags=["health"])
    async def check_alive() -> PydanticResponse:
        """Liveness: this process answers."""
        return PydanticResponse(Health(status="ok"))

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", response_model=Health, responses=documented(503), tags=["health"])
    async def check_ready(request: Request) -> PydanticResponse:
        """Readiness: warm (the model is loaded and label sets are embedded), and the model answers now."""
        nonlocal checked
        if time.monotonic() - checked > READY_SECONDS:
            await service.check_ready()
            checked = time.monotonic()
        return PydanticResponse(Health(status="ready"))


def _send_page(name: str, policy: str) -> Response:
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
    return FileResponse(PLAYGROUND / name, headers=headers)
