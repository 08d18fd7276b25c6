"""The endpoint as a Ray Serve application: ingress deployments that speak HTTP, and model replicas.

serve deploy configs/serve.yaml        in a cluster, with Ray's own tool
sightline serve configs/endpoint.yaml  on this machine
"""

# No postponed annotations: Ray Serve makes an EndpointConfig of a file's `args` because it finds the class in `build`.

from fastapi import FastAPI
from ray import serve as rayserve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serve.config import EndpointConfig, ProcessCount
from serve.http.app import make_app
from serve.rayserve import haproxy
from serve.rayserve.ports import make_private
from serve.rayserve.remote import RemoteModel
from serve.service import CALLS_PER_REPLICA

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


class Ingress:
    """Ray Serve's deployment of `make_app`."""

    def __init__(self, config: EndpointConfig, model: DeploymentHandle) -> None:
        self._config = config
        self._model = model

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self._config, RemoteModel(self._model), haproxy.enabled())


def build(args: EndpointConfig) -> Application:
    """The Ray Serve application: ingresses that speak HTTP and decode, replicas that run the model."""
    from serve.rayserve.replica import ModelServer  # not in the ingress's process

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
