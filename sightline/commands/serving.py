"""`sightline serve`: the endpoint on this machine, with a Ray of its own."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from serve.admission.auth import KeyRing
from serve.config import EndpointConfig, load_endpoint, pin_endpoint_model
from serve.rayserve import haproxy
from serve.rayserve.proxy import CALLBACK, CALLBACK_PATH
from serve.tokens import TokenVocabulary
from siglip.checkpoint import CheckpointError
from siglip.labels import LabelError
from storage.settings import ConfigError

APPLICATION = "sightline"
PROXY_SECONDS = 30.0
DRAIN_SECONDS = 60.0
"""How long requests under way may take when the endpoint is told to stop."""
SPARE_CPUS = 4
"""Logical cores beyond what the configuration asks for: Ray Serve's controller and proxy, and replicas of an update."""


def prepare_endpoint(path: Path, host: str, port: int) -> EndpointConfig:
    """Read the configuration and find what would fail later: model, keys, host, port. Raises `ConfigError`."""
    config = load_endpoint(path)
    if config.auth.keys_file is not None:
        KeyRing(config.auth.keys_file)
    elif not is_loopback(host):
        raise ConfigError(
            f"--host {host}: without API keys the endpoint listens on loopback only: make one with "
            "`sightline key new NAME` and set auth.keys_file"
        )
    if config.token_vocabulary is not None:
        TokenVocabulary(config.token_vocabulary)
    try:
        pin_endpoint_model(config)
    except (CheckpointError, LabelError) as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        with socket.create_server((host, port), family=_family(host)):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}: choose another --host or --port") from None
    return config


def run_endpoint(config: EndpointConfig, host: str, port: int, ready: Callable[[str, str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM, then finish what is in flight, and stop.

    Calls `ready` with the endpoint's URL and that of its Prometheus metrics when a request would be answered warm.
    """
    with _stop_signal() as stop, endpoint(config, host, port) as metrics:
        ready(f"http://{_in_url(host)}:{port}", metrics)
        stop.wait()


@contextmanager
def endpoint(config: EndpointConfig, host: str, port: int) -> Iterator[str]:
    """The endpoint, warm, on a Ray started for it. Yields the URL of its metrics."""
    with TemporaryDirectory(prefix="sl-", dir="/tmp") as folder:  # a short path: see `haproxy.environment`
        _set_environment(config, Path(folder), host, port)
        import ray
        from ray import serve as rayserve

        from pipelines.cluster import keep_sigterm
        from serve.app import build

        metrics_port = _free_port()
        cpus = sum(scaling.largest * (scaling.num_cpus or 1) for scaling in (config.replicas, config.ingress))
        with _quiet(), keep_sigterm():
            ray.init(
                address="local",
                num_cpus=int(2 * cpus) + SPARE_CPUS,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _metrics_export_port=metrics_port,
                _node_ip_address="127.0.0.1",
            )
        try:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            behind = os.environ[haproxy.ENABLED] == "1"
            rayserve.start(http_options={"host": "127.0.0.1" if behind else host, "port": port})
            rayserve.run(build(config), name=APPLICATION)
            _await_proxy(host, port)
            try:
                yield f"http://127.0.0.1:{metrics_port}/metrics"
            finally:
                haproxy.drain(Path(folder), DRAIN_SECONDS)
                with _quiet():
                    rayserve.shutdown()
        finally:
            with _quiet():
                ray.shutdown()


def _set_environment(config: EndpointConfig, folder: Path, host: str, port: int) -> None:
    """Ray reads these when its modules are first imported, and its processes inherit them."""
    environ = os.environ
    environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    environ.setdefault(CALLBACK, CALLBACK_PATH)
    environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # the log files have it all
    # One event loop in each replica instead of three: nothing of the endpoint's blocks it.
    environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
    environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "0")
    # Ray Serve's proxy, HAProxy or not, has three times as long to start, and who starts Ray Serve waits a minute for
    # it. The default, 3 x 5 s, is over on a machine whose cores are busy, and the start with it.
    environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "20")
    # Ray Serve's controller looks around ten times a second, with nothing to do: a twentieth of a core.
    environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    # This Ray is of one machine: without the means of a cluster its ports are loopback's, and no other's.
    environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if environ.setdefault(haproxy.ENABLED, "1" if haproxy.available() else "0") == "1":
        environ.update(haproxy.environment(folder, config.limits.deadline_s, f"{_in_url(host)}:{port}"))
        for name, value in haproxy.choose_ingress_ports(port).items():
            environ.setdefault(name, value)
        # An ingress stays for half a minute after its time, for load balancers that have yet to hear: here is none.
        environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "0")
        environ.setdefault("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", str(_free_port()))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _await_proxy(host: str, port: int) -> None:
    """Until the proxy knows of the ingress, which it is told a moment after Ray Serve calls the application running."""
    connection = HTTPConnection(host, port, timeout=PROXY_SECONDS)
    give_up = time.monotonic() + PROXY_SECONDS
    while time.monotonic() < give_up:
        with suppress(OSError, HTTPException):
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            answer.read()
            if answer.status == HTTPStatus.OK:
                break
        connection.close()
        time.sleep(0.1)
    connection.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray's own remarks: the log level it was given, and that Ray Serve's controller was stopped as asked."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def is_loopback(host: str) -> bool:
    """Whether a server on `host` can be reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set. A second one interrupts what still drains."""
    stop = threading.Event()

    def ask(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
