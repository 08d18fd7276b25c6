"""Routes that are not the API: the playground at `/`, the API reference at `/docs`, and health checks."""

from __future__ import annotations

import time
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

from serve.http.responses import PydanticResponse, documented
from serve.schemas import Health
from serve.service import Service

PLAYGROUND = Path(__file__).parents[1] / "playground"
READY_SECONDS = 1.0
"""Seconds for which a successful readiness check is reused, so that frequent checks cost the model almost nothing."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy: the page loads nothing from other hosts, and injected scripts do not run."""
DOCS_POLICY = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
"""Swagger UI uses inline styles."""
SWAGGER_UI = str(files("fastapi_offline") / "static")
"""Swagger UI's files. FastAPI's own page would load them from the internet, which a cluster may not reach."""


def add_page_routes(app: FastAPI, service: Service) -> None:
    """Register the routes."""
    last_ready = 0.0

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return _send_page("index.html", POLICY)

    @app.get("/docs", include_in_schema=False)
    async def reference() -> Response:
        return _send_page("docs.html", DOCS_POLICY)

    app.mount("/docs/ui", StaticFiles(directory=SWAGGER_UI), name="swagger-ui")
    app.mount("/playground", StaticFiles(directory=PLAYGROUND, check_dir=False), name="playground")

    @app.get("/ping", include_in_schema=False)  # the path that SageMaker and vLLM use
    @app.get("/health", include_in_schema=False)  # the path that most other servers use
    @app.get("/healthz", response_model=Health, tags=["health"])
    async def check_alive() -> PydanticResponse:
        """Liveness: this process responds."""
        return PydanticResponse(Health(status="ok"))

    @app.get("/readyz", response_model=Health, responses=documented(503), tags=["health"])
    async def check_ready() -> PydanticResponse:
        """Readiness: the model is loaded, the label sets are embedded, and the model responds now."""
        nonlocal last_ready
        if time.monotonic() - last_ready > READY_SECONDS:
            await service.check_ready()
            last_ready = time.monotonic()
        return PydanticResponse(Health(status="ready"))


def _send_page(name: str, policy: str) -> Response:
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
    return FileResponse(PLAYGROUND / name, headers=headers)
