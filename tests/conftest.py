"""Fixtures that several test folders share, and the rule that sorts the tests into tiers (see CONTRIBUTING.md).

Nothing heavy is imported before a test asks for it: `make quick` and the collection of tests stay fast.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from serve.rayserve import haproxy, internals
from serve.rayserve.proxy import CALLBACK_PATH
from tests.support.clients.worker import NotInstalledError
from tests.support.ray_cluster import RayCluster
from tests.support.stores.azurite import Azurite
from tests.support.stores.fault_proxy import fault_proxy
from tests.support.stores.google_server import GoogleServer
from tests.support.stores.hub_server import HubServer
from tests.support.stores.radosgw import Radosgw, why_not
from tests.support.stores.service import Service

TESTS = Path(__file__).parent

CORE = (
    "clients",
    "quick",
    "model",
    "endpoint",
    "ray/test_api.py",
    "ray/test_command.py",
    "ray/test_faults.py",
    "ray/test_job.py",
    "ray/test_property.py",
    "ray/test_retag.py",
    "ray/test_waiting_inputs.py",
    "rayserve/test_command.py",
)
"""The folders and files whose tests `make test` runs, apart from those with a mark of `NOT_CORE`."""

NOT_CORE = ("alone", "azure", "browser", "gpu", "s3", "slow")
"""Marks of tests that need the whole machine, a system package or a GPU, or that take long."""

LONG = ("clients", "ray", "rayserve", "k8s", "wheel", "quick/siglip/test_decoder.py")
"""Folders and files whose tests take longest."""


def require(what: str, missing: str | None) -> None:
    """Skip a test whose system packages are missing. With SIGHTLINE_CI set the test fails instead.

    `missing` says what is missing and how to install it; None means that everything is there.
    """
    if missing and os.environ.get("SIGHTLINE_CI"):
        pytest.fail(f"no {what}: {missing}")
    if missing:
        pytest.skip(f"no {what}: {missing}")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks of the tiers, and set the environment that Ray Serve reads when it is first imported.

    Test files import Ray Serve when they are collected, which is later than this hook.
    """
    config.addinivalue_line("markers", "core: what `make test` runs; set by `CORE` in tests/conftest.py, never by hand")
    config.addinivalue_line("markers", "slow: takes more than about 5 seconds, so it is not core")
    folder = TemporaryDirectory(prefix="sl-", dir="/tmp")
    config.add_cleanup(folder.cleanup)
    os.environ.update({internals.PROXY_CALLBACK: CALLBACK_PATH, **haproxy.make_environment(Path(folder.name), 30)})
    # A replica that stops first waits 30 s by default, so that load balancers learn of it. Here there is only HAProxy.
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "5"
    # With pytest-xdist each process of tests has its own Ray Serve: without other numbers they would share these ports.
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.environ.update(internals.fallback_port(8500 + number) | internals.ingress_ports(number))


@pytest.hookimpl(tryfirst=True)  # before pytest deselects tests by their marks (-m)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the core tests, and put the files that take longest first.

    pytest-xdist hands out files in this order, so that no process begins a long file when the others are done.
    """

    def is_in(item: pytest.Item, places: tuple[str, ...]) -> bool:
        path = item.path.relative_to(TESTS).as_posix()
        return any(path == place or path.startswith(f"{place}/") for place in places)

    for item in items:
        if is_in(item, CORE) and not any(item.get_closest_marker(mark) for mark in NOT_CORE):
            item.add_marker("core")
    items.sort(key=lambda item: not is_in(item, LONG))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Radosgw]:
    """A real S3 server, Ceph's radosgw, for the whole session."""
    require("S3 server", why_not())
    server = Radosgw(tmp_path_factory.mktemp("radosgw"))
    yield server
    server.stop()


@pytest.fixture
def s3_env(s3: Radosgw, monkeypatch: pytest.MonkeyPatch) -> Radosgw:
    """The S3 server; this process's environment has its address and keys during the test."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture(scope="session")
def azurite(request: pytest.FixtureRequest) -> Iterator[Azurite]:
    """Azure's emulator, for the whole session."""
    try:
        server = Azurite(request.config.cache.mkdir("clients"))
    except NotInstalledError as error:
        require("Azure server", f"npm cannot install Azurite: {error}")
        raise
    yield server
    server.stop()


@pytest.fixture(scope="session")
def google() -> Iterator[GoogleServer]:
    """A stand-in for Google's store, for the whole session."""
    server = GoogleServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    """A stand-in for the Hugging Face hub, for the whole session."""
    server = HubServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_service(s3: Radosgw) -> Iterator[Service]:
    """The S3 server behind a proxy that injects faults."""
    with fault_proxy(s3.endpoint) as proxy:
        yield Service("s3", s3, proxy)


@pytest.fixture(scope="session")
def gs_service(google: GoogleServer) -> Iterator[Service]:
    """The stand-in for Google's store behind a proxy that injects faults."""
    with fault_proxy(google.endpoint) as proxy:
        yield Service("gs", google, proxy)


@pytest.fixture(scope="session")
def az_service(azurite: Azurite) -> Iterator[Service]:
    """Azure's emulator behind a proxy that injects faults."""
    with fault_proxy(azurite.endpoint) as proxy:
        yield Service("az", azurite, proxy)


@pytest.fixture(scope="session")
def store_env(request: pytest.FixtureRequest) -> dict[str, str]:
    """Environment variables for Ray's processes: addresses and keys of the servers that the session's tests need.

    Without an S3 server on this machine it has none of S3. With SIGHTLINE_CI set a missing server is an error. The
    addresses of Google's and Azure's are those of proxies: a job does not name them, so no test can give others.
    """
    env: dict[str, str] = {}
    if any(item.get_closest_marker("azure") for item in request.session.items):
        env |= request.getfixturevalue("az_service").env | request.getfixturevalue("gs_service").env
    if any("hub" in getattr(item, "fixturenames", ()) for item in request.session.items):
        env |= request.getfixturevalue("hub").env
    wanted = any(item.get_closest_marker("s3") for item in request.session.items)
    if wanted and (not why_not() or os.environ.get("SIGHTLINE_CI")):
        env |= request.getfixturevalue("s3").env
    return env


@pytest.fixture(scope="session")
def local_ray(store_env: dict[str, str]) -> Iterator[None]:
    """One Ray with 16 logical CPUs for the tests that call the job in this process."""
    import logging

    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in store_env.items():
            patch.setenv(name, value)
        ray.init(num_cpus=16, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_cluster(store_env: dict[str, str]) -> Iterator[RayCluster]:
    """A Ray cluster with a head, a node `readers` (2 CPUs) and a node `actors` (1 CPU and 1 GPU).

    CPUs and GPUs are numbers that Ray counts; the machine needs none of them.
    The nodes' processes have the environment of a pod: the S3 server's address and keys if there is a server, and Ray
    Serve's callback. A test that ends a node adds another of the same kind. Each test file has a cluster of its own,
    because an idle cluster takes 2 GB of memory.
    """
    with RayCluster({**store_env, internals.PROXY_CALLBACK: CALLBACK_PATH}) as cluster:
        cluster.add_worker("readers", 2)
        cluster.add_worker("actors", 1, gpus=1)
        yield cluster
