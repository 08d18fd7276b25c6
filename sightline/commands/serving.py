"""`sightline serve`: launches the endpoint on this machine, on a Ray that is started for it."""

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
from types import FrameType

from serve.admission.auth import KeyRing
from serve.config import EndpointConfig, load_endpoint, pin_endpoint_model
from serve.rayserve import haproxy, internals
from serve.rayserve.folders import make_folder
from serve.rayserve.proxy import CALLBACK_PATH
from serve.tokens import TokenVocabulary
from sightline.exits import INTERRUPTED, err, fail
from siglip.checkpoint import PinnedModel
from siglip.checkpoints.files import CheckpointError
from siglip.families.tokenizer import load_tokenizer
from siglip.labels import LabelError
from storage.settings import ConfigError

APPLICATION = "sightline"
PROXY_SECONDS = 30.0
"""How long to wait until the proxy forwards requests to the ingress."""
DRAIN_SECONDS = 60.0
"""How long ongoing requests may take when the endpoint is told to stop."""
STOPPING = b"stopping: the requests in progress are completed; Ctrl-C again interrupts them\n"
SPARE_CPUS = 4
"""Ray's logical cores in addition to twice those of the configuration: for Ray Serve's controller and proxy, and for
the new replicas of an update."""


def prepare_endpoint(path: Path, host: str, port: int) -> EndpointConfig:
    """Read the configuration, and check model, keys file, searched output, host and port before Ray starts.

    Raises `ConfigError`.
    """
    config = load_endpoint(path)
    if config.auth.keys_file is not None:
        KeyRing(config.auth.keys_file)
    elif not is_loopback(host):
        raise ConfigError(
            f"--host {host}: without API keys the endpoint listens on loopback only: make a key with "
            "`sightline key new NAME` and set auth.keys_file"
        )
    if config.token_vocabulary is not None:
        TokenVocabulary(config.token_vocabulary)
    try:
        pinned = pin_endpoint_model(config)
        check_label_sets(config, pinned)
    except (CheckpointError, LabelError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if config.search is not None:
        from serve.search.output import read_output

        read_output(config.search.output, pinned.identity)
    try:
        with socket.create_server((host, port), family=_family(host)):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}: choose another --host or --port") from None
    return config


def check_label_sets(config: EndpointConfig, pinned: PinnedModel) -> None:
    """Check that the model can read the registered label sets: an ingress that finds this would be started in vain.

    Raises `siglip.checkpoints.files.CheckpointError` and `siglip.labels.LabelError`.
    """
    if not config.label_sets:
        return
    tokenizer = load_tokenizer(pinned)
    for labels in config.label_sets.values():
        tokenizer.read_labels(labels)[1].check()


def run_endpoint(config: EndpointConfig, host: str, port: int, ready: Callable[[str, str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM, then finish the ongoing requests, and stop.

    Calls `ready` with the URLs of the endpoint and of its Prometheus metrics when the model is loaded and the endpoint
    accepts requests. Prints a warning to stderr if Ray is newer than the tested version, and a line when it is told to
    stop. A second Ctrl-C or SIGTERM ends the command with exit code 130, and the ongoing requests with it.
    """
    if warning := internals.describe_untested_ray():
        err.print(warning, highlight=False, markup=False)
    try:
        with _stop_signal() as stop, endpoint(config, host, port) as metrics:
            ready(f"http://{_in_url(host)}:{port}", metrics)
            stop.wait()
    except KeyboardInterrupt:
        fail("interrupted: the requests in progress have no responses", INTERRUPTED)


@contextmanager
def endpoint(config: EndpointConfig, host: str, port: int) -> Iterator[str]:
    """Run the endpoint on a Ray started for it, and stop both afterwards. Yields the URL of the Prometheus metrics."""
    with make_folder() as folder:
        _set_environment(config, folder, host, port)
        haproxy.check_connections(config.connections)
        import ray
        from ray import serve as rayserve

        from pipelines.ray_internals import keep_signals, own_code_first, silence_stderr
        from serve.app import build

        metrics_port = _free_port()
        cpus = sum(scaling.largest * (scaling.num_cpus or 1) for scaling in (config.replicas, config.ingress))
        # Ray prints the log level that it was given and, at the end, that Ray Serve's controller was stopped.
        with silence_stderr(), keep_signals():
            ray.init(
                address="local",
                job_config=own_code_first(),
                num_cpus=int(2 * cpus) + SPARE_CPUS,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                **internals.loopback_options(metrics_port),
            )
        try:
            logging.getLogger(internals.LOGGER).setLevel(logging.ERROR)
            behind = os.environ[internals.ENABLE_HAPROXY] == "1"
            rayserve.start(http_options={"host": "127.0.0.1" if behind else host, "port": port})
            rayserve.run(build(config), name=APPLICATION)
            _await_proxy(host, port)
            try:
                yield f"http://127.0.0.1:{metrics_port}/metrics"
            finally:
                haproxy.drain(folder, DRAIN_SECONDS)
                if not behind:  # after draining, nothing is left that Ray Serve, which takes seconds, could complete
                    with silence_stderr():
                        rayserve.shutdown()
        finally:
            with silence_stderr():
                ray.shutdown()


def _set_environment(config: EndpointConfig, folder: Path, host: str, port: int) -> None:
    """Set the variables that Ray reads when its modules are first imported. Ray's processes inherit them."""
    environ = os.environ
    environ.update(internals.LOOPBACK_ONLY)
    defaults = {**internals.LOCAL_DEFAULTS, internals.PROXY_CALLBACK: CALLBACK_PATH}
    if environ.setdefault(internals.ENABLE_HAPROXY, "1" if haproxy.is_available() else "0") == "1":
        bind = f"{_in_url(host)}:{port}"
        environ.update(haproxy.make_environment(folder, config.limits.deadline_s, bind, config.connections))
        defaults |= internals.NO_DRAINING | internals.ingress_ports(port) | internals.fallback_port(_free_port())
    for name, value in defaults.items():
        environ.setdefault(name, value)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _await_proxy(host: str, port: int) -> None:
    """Wait until the proxy forwards requests, which begins a moment after Ray Serve reports that the ingress runs."""
    connection = HTTPConnection(host, port, timeout=PROXY_SECONDS)
    give_up = time.monotonic() + PROXY_SECONDS
    while time.monotonic() < give_up:
        with suppress(OSError, HTTPException):
            connection.request("GET", "/healthz")
            response = connection.getresponse()
            response.read()
            if response.status == HTTPStatus.OK:
                break
        connection.close()
        time.sleep(0.1)
    connection.close()


def is_loopback(host: str) -> bool:
    """Whether a server on `host` is reachable from this machine only."""
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
    """Yield an event that Ctrl-C and SIGTERM set. A second signal interrupts the draining of requests."""
    stop = threading.Event()

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        os.write(sys.stderr.fileno(), STOPPING)  # not the console, in whose lock this thread may be

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
