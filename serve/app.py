"""The application: routes over a model, and both as a Ray Serve application.

serve deploy configs/serve.yaml        in a cluster, with Ray's own tool
sightline serve configs/endpoint.yaml  on this machine
"""

# No postponed annotations: Ray Serve makes an EndpointConfig of a file's `args` because it finds the class in `build`.

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from ray import serve as rayserve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from serve import haproxy
from serve.auth import KeyRing
from serve.bodies import JsonRoute
from serve.config import EndpointConfig, ProcessCount
from serve.errors import CODES, ApiError
from serve.middleware import Middleware
from serve.model import Model
from serve.pages import add_pages
from serve.ports import make_private
from serve.remote import RemoteModel
from serve.routes.cohere import add_cohere_routes
from serve.routes.huggingface import add_huggingface_routes
from serve.routes.openai import add_openai_routes
from serve.routes.tagging import add_tagging_routes
from serve.scrape import add_scrape
from serve.service import CALLS_PER_REPLICA, Service
from serve.validation import describe_validation

DESCRIPTION = (
    "Image tagging and embedding with SigLIP. Every answer that is not a success is OpenAI's error envelope; every "
    "answer carries the fingerprint of model and label set, and a Server-Timing header.\n\n"
    "Error codes:\n\n" + "\n".join(f"* `{code}` ({status}): {meaning}" for code, (status, meaning) in CODES.items())
)
HEALTH_SECONDS = 30.0
"""How long a replica's health check may take: a busy model comes to it after the batches before."""
DRAIN_SECONDS = 60.0
"""How long a replica that is to stop may take to finish what it holds."""
INGRESS_BUSY = 32
"""Requests under way at which an ingress has as much to do as it can: what one holds when its core is all taken."""
METRICS_SECONDS, LOOK_BACK_SECONDS = 2.0, 10.0
"""How often processes tell what they have under way, and over how long that is averaged: Ray Serve's 10 and 30 s would
be most of a short wave of requests."""
INGRESS_REQUESTS = 1024
"""Requests that Ray Serve hands to an ingress at once. Its own gate refuses with more sense, and comes first."""


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
    """Every refusal goes up to `serve.middleware`, which writes all of them."""
    if isinstance(error, RequestValidationError):
        raise describe_validation(error.errors()) from None
    if isinstance(error, HTTPException) and not isinstance(error, ApiError):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        raise ApiError(code, str(error.detail), status=error.status_code) from None
    raise error


class Ingress:
    """Ray Serve's deployment of `make_app`."""

    def __init__(self, config: EndpointConfig, model: DeploymentHandle) -> None:
        self._config = config
        self._model = model

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self._config, RemoteModel(self._model), haproxy.enabled())


def build(args: EndpointConfig) -> Application:
    """The Ray Serve application: ingresses that speak HTTP and decode, replicas that run the model."""
    from serve.replica import ModelServer  # not in the ingress's process

    logging = {"encoding": "JSON", "enable_access_log": False}
    replicas, ingress = args.replicas, args.ingress
    model = rayserve.deployment(
        make_private(ModelServer),
        name="model",
        **_scale(replicas, CALLS_PER_REPLICA),
        ray_actor_options={
            "num_gpus": replicas.num_gpus,
            "num_cpus": 1 if replicas.num_cpus is None else replicas.num_cpus,
            "resources": replicas.resources,
        },
        max_ongoing_requests=args.replica_items(),
        max_queued_requests=args.limits.in_flight,
        health_check_period_s=10,
        health_check_timeout_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=1,
        logging_config=logging,
    )
    front = rayserve.deployment(
        rayserve.ingress()(make_private(Ingress)),
        name="ingress",
        **_scale(ingress, INGRESS_BUSY),
        ray_actor_options={
            "num_cpus": 1 if ingress.num_cpus is None else ingress.num_cpus,
            "resources": ingress.resources,
        },
        max_ongoing_requests=INGRESS_REQUESTS,
        max_queued_requests=INGRESS_REQUESTS,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        health_check_period_s=10,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=1,
        logging_config=logging,
    )
    return front.bind(args, model.bind(args))


def _scale(scaling: ProcessCount, busy: int) -> dict[str, object]:
    """Ray Serve's arguments for so many processes, of which there are more when each has `busy` calls under way.

    Calls are what Ray Serve counts, whatever is in them: an ingress makes one of each batch, and has no more than
    `CALLS_PER_REPLICA` under way for each replica that there may be.
    """
    if scaling.largest == scaling.min:
        return {"num_replicas": scaling.min}
    return {
        "autoscaling_config": {
            "min_replicas": scaling.min,
            "initial_replicas": scaling.min,
            "max_replicas": scaling.largest,
            "target_ongoing_requests": busy,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "metrics_interval_s": METRICS_SECONDS,
            "look_back_period_s": LOOK_BACK_SECONDS,
        }
    }
