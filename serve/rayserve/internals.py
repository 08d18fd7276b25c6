"""The private names of Ray, Ray Serve and gRPC that the endpoint uses, each with its reason. No other file has any.

Importing this module imports neither Ray nor gRPC: Ray reads its environment variables when its modules are first
imported, and `sightline serve` sets them before. `tests/quick/serve/test_internals.py` fails with the name that an
installed Ray or gRPC no longer has. `serve.rayserve.haproxy` knows the HAProxy configuration that Ray Serve writes.
"""

from __future__ import annotations

import functools
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from starlette.types import ASGIApp

TESTED_RAY = "2.60.0"
"""The version of Ray that these names were tested with, as in constraints.txt."""

LOGGER = "ray.serve"
"""Ray Serve's logger. Its handlers write JSON with the request id into the replica's log file. In a replica, a logger
outside of this hierarchy reaches no handler."""

PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Names a function that returns middleware for Ray Serve's own HTTP proxy."""
ENABLE_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
"""Set to 1, it makes Ray Serve start HAProxy instead of its own HTTP proxy."""
HAPROXY_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
"""The command that Ray Serve starts as HAProxy."""

LOCAL_DEFAULTS = {
    # Ray's core would log to the terminal.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # Ray Serve would log to the terminal. Its log files hold the same records.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # A replica runs one event loop instead of three, because no code of the endpoint blocks it.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Ray Serve's controller restarts a proxy, HAProxy or its own, that fails three checks of this many seconds, and
    # `serve.start` waits a minute for the proxy. The default of 5 s (15 s for three checks) is too short on a machine
    # whose cores are busy, and then the whole start fails.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
    # A HAProxy that has ended is replaced after three checks. A check that gets no answer still takes 10 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # By default Ray Serve's controller runs its loop ten times a second, which takes a twentieth of a core when idle.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}
"""Environment variables of `sightline serve`. A variable that is already set keeps its value."""

LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment variables of a Ray on one machine: without support for clusters, Ray's ports listen on loopback only."""

NO_DRAINING = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0"}
"""Environment variables behind a local HAProxy. By default an ingress that is told to stop runs for another 30 s, so
that load balancers can notice. On one machine there is no load balancer."""


def describe_untested_ray(installed: str | None = None) -> str | None:
    """Return a warning in one line if Ray is newer than `TESTED_RAY`, else None. `installed` is Ray's version."""
    installed = installed or version("ray")
    if _parse_version(installed) <= _parse_version(TESTED_RAY):
        return None
    return (
        f"warning: Ray {installed} is installed, and Sightline was tested with Ray {TESTED_RAY}: "
        f"if the endpoint fails inside Ray Serve, install ray[serve]=={TESTED_RAY}"
    )


def _parse_version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def haproxy_variables(binary: Path, folder: Path, silence_s: int) -> dict[str, str]:
    """Return the environment variables with which Ray Serve starts `binary` as HAProxy, with all its files in `folder`.

    HAProxy closes a connection after `silence_s` seconds without a byte from its client or its ingress.
    """
    return {
        ENABLE_HAPROXY: "1",
        HAPROXY_BINARY: str(binary),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "log.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(silence_s),
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(silence_s),
    }


def fallback_port(port: int) -> dict[str, str]:
    """Return the environment variable for the port of Ray Serve's own proxy, which HAProxy falls back to.

    By default this port is 8500, which two endpoints on one machine would share.
    """
    return {"RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(port)}


def ingress_ports(number: int) -> dict[str, str]:
    """Return the environment variables for the ports of the ingresses behind HAProxy: 100 ports, chosen by `number`.

    Numbers that differ by less than 100 get different ports. By default Ray Serve takes the first free port from 30000
    on. With two endpoints on one machine, an ingress of one could take the port that an ingress of the other has just
    left, while the other's HAProxy still sends requests to this port.
    """
    first = 20_000 + number % 100 * 100
    return {
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + 100),
    }


def loopback_options(metrics_port: int) -> dict[str, Any]:
    """Return arguments of `ray.init` for a node at 127.0.0.1 whose Prometheus metrics are on `metrics_port`.

    `ray.init` has no public argument for either. Without them Ray takes the machine's outward address and a random
    port.
    """
    return {"_metrics_export_port": metrics_port, "_node_ip_address": "127.0.0.1"}


def pass_by_value(handle: DeploymentHandle) -> DeploymentHandle:
    """Return a handle whose calls carry arguments and results inside the gRPC message. Ray Serve allows 4 MiB."""
    return handle.options(_by_reference=False)


def pass_by_reference(handle: DeploymentHandle) -> DeploymentHandle:
    """Return a handle whose calls carry arguments and results through Ray's object store."""
    return handle.options(_by_reference=True)


class LateIngress:
    """Base class of an ingress deployment that builds its ASGI application in the replica's process.

    Pass a subclass to `serve.ingress()` without an application. An application that is passed to `serve.ingress(app)`
    is pickled in the process that deploys, so it could not depend on the deployment's arguments.
    """

    def build_app(self) -> ASGIApp:
        """Return the application. It is called once, after the constructor."""
        raise NotImplementedError

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self.build_app()


ALL_INTERFACES = "[::]:0"
"""The address at which Ray Serve opens a replica's gRPC port (`_on_initialized` of its `replica.py`): a free port on
all interfaces."""


def restrict_replica_port(deployment: type) -> type:
    """Return a subclass of `deployment` whose replicas open their gRPC port on the node's address only.

    Other replicas call that port. Ray Serve opens it on all interfaces and has no setting for it, and a client that
    reaches it can have a pickle loaded. Replicas call each other at the node's address, so this address is enough; it
    is 127.0.0.1 for a Ray that was started with `loopback_options`.

    Apply it to the class before `serve.ingress` wraps the class.
    """

    class Restricted(deployment):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            _bind_to_node()
            super().__init__(*args, **options)

    return Restricted


def _bind_to_node() -> None:
    """Patch gRPC in this process: a server that asks for `ALL_INTERFACES` gets a port on the node's address instead."""
    import ray.util
    from grpc.aio._server import Server

    bind = Server.add_insecure_port
    if getattr(bind, "on_node", False):
        return

    @functools.wraps(bind)
    def bind_on_node(server: Server, address: str) -> int:
        if address == ALL_INTERFACES:
            host = ray.util.get_node_ip_address()
            address = f"[{host}]:0" if ":" in host else f"{host}:0"
        return int(bind(server, address))

    bind_on_node.on_node = True  # type: ignore[attr-defined]
    Server.add_insecure_port = bind_on_node
