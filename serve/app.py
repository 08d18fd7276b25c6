"""The endpoint as a Ray Serve application: ingress deployments that speak HTTP, and model replicas.

serve deploy configs/serve.yaml        in a cluster, with Ray's own command
sightline serve configs/endpoint.yaml  on this machine
"""

# No `from __future__ import annotations`: Ray Serve makes an EndpointConfig of a file's `args` because it finds the
# class itself, and not its name, in the signature of `build`.

from fastapi import FastAPI
from ray import serve as rayserve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serve.config import EndpointConfig, ProcessCount
from serve.embedding.embedder import CALLS_PER_REPLICA
from serve.http.app import make_app
from serve.rayserve import haproxy
from serve.rayserve.internals import LateIngress, restrict_replica_port
from serve.rayserve.remote import RemoteModel

HEALTH_SECONDS = 30.0
"""How long a replica's health check may take: a busy model runs the batches that were there first."""
INGRESS_PERIOD_SECONDS = 1.0
"""How often Ray Serve checks an ingress. It notices only by a check that an ingress's process has ended."""
DRAIN_SECONDS = 60.0
"""How long a replica that is told to stop may take to finish the requests that it holds."""
INGRESS_BUSY = 32
"""Ongoing requests per ingress that autoscaling aims at: about as many as an ingress holds when its core is fully
used."""
METRICS_SECONDS, LOOK_BACK_SECONDS = 2.0, 10.0
"""How often processes report their ongoing calls, and over how long autoscaling averages the reports. Ray Serve's
defaults, 10 and 30 s, are about as long as a short wave of requests."""
SPARE_REQUESTS = 64
"""Requests that Ray Serve gives to an ingress at the same time, beyond `limits.requests`: the ingress's own admission
control refuses earlier, and with better error messages, and health checks are not refused."""


class Ingress(LateIngress):
    """Ray Serve deployment of `make_app`."""

    def __init__(self, config: EndpointConfig, model: DeploymentHandle) -> None:
        self._config = config
        self._model = model

    def build_app(self) -> FastAPI:
        """Return the HTTP application, with the model behind its handle."""
        return make_app(self._config, RemoteModel(self._model), haproxy.is_enabled())


def build(args: EndpointConfig) -> Application:
    """Return the Ray Serve application: ingresses that speak HTTP and decode images, and replicas of the model.

    Raises `storage.settings.ConfigError` if `args` limits connections otherwise than the HAProxy of this Ray Serve.
    """
    haproxy.check_connections(args.connections)
    from serve.rayserve.replica import ModelServer  # here, so that an ingress's process does not import it

    logging = {"encoding": "JSON", "enable_access_log": False}
    replicas, ingress = args.replicas, args.ingress
    model = rayserve.deployment(
        restrict_replica_port(ModelServer),
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
        rayserve.ingress()(restrict_replica_port(Ingress)),
        name="ingress",
        **_scale(ingress, INGRESS_BUSY),
        ray_actor_options={
            "num_cpus": 1 if ingress.num_cpus is None else ingress.num_cpus,
            "resources": ingress.resources,
        },
        max_ongoing_requests=args.limits.requests + SPARE_REQUESTS,
        max_queued_requests=args.limits.requests + SPARE_REQUESTS,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        health_check_period_s=INGRESS_PERIOD_SECONDS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=1,
        logging_config=logging,
    )
    return front.bind(args, model.bind(args))


def _scale(scaling: ProcessCount, busy: int) -> dict[str, object]:
    """Return Ray Serve's arguments for the number of processes. Autoscaling aims at `busy` ongoing calls per process.

    Ray Serve counts calls, however many items a call holds. An ingress makes one call per batch, and has at most
    `CALLS_PER_REPLICA` ongoing calls for each replica that there may be.
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
