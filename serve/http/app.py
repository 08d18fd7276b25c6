"""The HTTP application: middleware and routes over a `serve.service.Service`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from serve.admission.auth import KeyRing
from serve.config import EndpointConfig
from serve.http.bodies import JsonRoute
from serve.http.errors import CODES, ApiError
from serve.http.middleware import Middleware
from serve.http.validation import describe_validation
from serve.model import Model
from serve.routes.cohere import add_cohere_routes
from serve.routes.huggingface import add_huggingface_routes
from serve.routes.openai import add_openai_routes
from serve.routes.pages import add_pages
from serve.routes.prometheus import add_scrape
from serve.routes.tagging import add_tagging_routes
from serve.service import Service

DESCRIPTION = (
    "Image tagging and embedding with SigLIP. Every answer that is not a success is OpenAI's error envelope; every "
    "answer carries the fingerprint of model and label set, and a Server-Timing header.\n\n"
    "Error codes:\n\n" + "\n".join(f"* `{code}` ({status}): {meaning}" for code, (status, meaning) in CODES.items())
)


def make_app(config: EndpointConfig, model: Model, behind_haproxy: bool = False) -> FastAPI:
    """The HTTP application over a model, here or behind a handle. It is warm when its lifespan has started.

    Behind Ray Serve's HAProxy the connections are HAProxy's, and a header tells whose requests they carry.
    """
    service = Service(config, model)
    keys = KeyRing(config.auth.keys_file) if config.auth.keys_file else None

    @asynccontextmanager
    async def live(_app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="Sightline",
        version=version("sightline"),
        description=DESCRIPTION,
        lifespan=live,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    app.router.route_class = JsonRoute
    add_openai_routes(app, service)
    add_tagging_routes(app, service)
    add_huggingface_routes(app, service)
    add_cohere_routes(app, service)
    add_pages(app, service)
    if config.metrics_route:
        add_scrape(app)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_middleware(Middleware, service=service, keys=keys, behind_haproxy=behind_haproxy)
    if config.cors.origins:
        # Outermost, because a browser asks first, without a key, whether it may ask.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
            max_age=600,
        )
    _forget_422(app.openapi())
    return app


def _forget_422(schema: dict[str, Any]) -> None:
    """Take out FastAPI's own answer to requests that do not validate, which nobody gets here. The schema is cached."""
    for item in schema["paths"].values():
        for operation in item.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


def _refuse(_request: Request, error: Exception) -> JSONResponse:
    """Every refusal goes up to `serve.http.middleware`, which writes all of them."""
    if isinstance(error, RequestValidationError):
        raise describe_validation(error.errors()) from None
    if isinstance(error, HTTPException) and not isinstance(error, ApiError):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        raise ApiError(code, str(error.detail), status=error.status_code) from None
    raise error
