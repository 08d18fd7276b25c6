"""The HTTP application: middlewares and routes over a `serve.service.Service`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match

from serve.admission.auth import KeyRing
from serve.config import EndpointConfig
from serve.http.bodies.json_body import JsonRoute
from serve.http.errors import CODES, ApiError
from serve.http.middleware.cors import CorsMiddleware
from serve.http.middleware.stack import MiddlewareStack
from serve.http.openapi import add_openapi_route
from serve.http.quoting import shorten
from serve.http.validation import describe_validation, is_clients_error
from serve.model import Model
from serve.routes.cohere import add_cohere_routes
from serve.routes.huggingface import add_huggingface_routes
from serve.routes.moderations import add_moderation_routes
from serve.routes.openai import add_openai_routes
from serve.routes.pages import add_page_routes
from serve.routes.prometheus import add_metrics_route
from serve.routes.search import add_search_routes
from serve.routes.tagging import add_tagging_routes
from serve.service import Service

ROUTES: tuple[Callable[[FastAPI, Service], None], ...] = (
    add_openai_routes,
    add_tagging_routes,
    add_search_routes,
    add_moderation_routes,
    add_huggingface_routes,
    add_cohere_routes,
    add_page_routes,
    add_metrics_route,
)
"""What registers the routes, one function for each module of `serve.routes`, in the order of the API reference."""
DESCRIPTION = (
    "Image tagging and embedding with SigLIP. Every response that is not a success is OpenAI's error envelope. Every "
    "response has the fingerprint of model and label set, and a Server-Timing header.\n\n"
    "Error codes:\n\n" + "\n".join(f"* `{code}` ({status}): {meaning}" for code, (status, meaning) in CODES.items())
)
"""The introduction of the API reference."""


def make_app(config: EndpointConfig, model: Model, behind_haproxy: bool = False) -> FastAPI:
    """Make the HTTP application. It is ready for requests once its lifespan has started.

    `model` may be in this process or behind a Ray Serve handle. With `behind_haproxy`, connections come from Ray
    Serve's HAProxy, and a header has the address of the client.
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
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    app.router.route_class = JsonRoute
    for add_routes in ROUTES:
        add_routes(app, service)
    app.add_exception_handler(ApiError, _pass_on)
    app.add_exception_handler(RequestValidationError, _pass_on)
    app.add_exception_handler(HTTPException, _pass_on)
    app.add_exception_handler(ValidationError, _pass_on)
    app.add_middleware(MiddlewareStack, service=service, keys=keys, behind_haproxy=behind_haproxy)
    # Outermost, because a browser sends its preflight request without an API key.
    app.add_middleware(CorsMiddleware, origins=config.cors.origins)
    add_openapi_route(app, has_keys=keys is not None)
    return app


def _list_methods(request: Request) -> list[str]:
    """The methods that the request's path allows, of all its routes. A mounted folder allows those that read."""
    scope = request.scope
    root = scope.get("app_root_path", scope.get("root_path", ""))  # a mounted folder has changed `root_path`
    asked = {"type": "http", "path": scope["path"], "root_path": root, "method": "", "headers": []}
    found: set[str] = set()
    for route in request.app.routes:
        if route.matches(asked)[0] != Match.NONE:
            found |= getattr(route, "methods", None) or {"GET"}
    return sorted(found | {"HEAD"} if "GET" in found else found)


async def _pass_on(request: Request, error: Exception) -> JSONResponse:
    """Raise every error as an `ApiError`: `serve.http.middleware.error_envelope` sends all error responses.

    It is a coroutine because Starlette runs other functions in a thread.
    """
    if isinstance(error, RequestValidationError):
        raise describe_validation(error.errors()) from None
    if isinstance(error, ValidationError) and is_clients_error(error):
        raise describe_validation(error.errors(include_url=False)) from None
    if isinstance(error, HTTPException) and not isinstance(error, ApiError):
        if error.status_code == 405:
            allow = _list_methods(request)
            message = f"this path allows {', '.join(allow)}, not {shorten(request.method)}"
            raise ApiError("method_not_allowed", message, allow=allow) from None
        code = "not_found" if error.status_code == 404 else "invalid_request"
        raise ApiError(code, str(error.detail), status=error.status_code) from None
    raise error
