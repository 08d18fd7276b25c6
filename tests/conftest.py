"""What several folders' tests use. Nothing heavy is imported before a test asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from serve.rayserve import haproxy, internals
from serve.rayserve.proxy import CALLBACK_PATH
from tests.support.ray_cluster import RayCluster
from tests.support.stores.radosgw import Radosgw, why_not

TESTS = Path(__file__).parent


def require(what: str, missing: str | None) -> None:
    """Skip a test whose system packages are missing; fail it where CI must have them."""
    if missing and os.environ.get("SIGHTLINE_CI"):
        pytest.fail(f"no {what}: {missing}")
    if missing:
        pytest.skip(f"no {what}: {missing}")


def pytest_configure(config: pytest.Config) -> None:
    """Ray Serve reads its environment when it is first imported, which test files do when they are."""
    folder = TemporaryDirectory(prefix="sl-", dir="/tmp")
    config.add_cleanup(folder.cleanup)
    os.environ.update({internals.PROXY_CALLBACK: CALLBACK_PATH, **haproxy.make_environment(Path(folder.name), 30)})
    # A replica that stops waits for load balancers to hear of it: 30 s, and here there is none but HAProxy.
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "5"
    # Tests that run at the same time, in processes of pytest's, have a Ray Serve each, and would share these ports.
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.environ.update(internals.fallback_port(8500 + number) | internals.ingress_ports(number))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest is first: in several processes none of them is left with it at the end."""
    items.sort(key=lambda item: item.path.relative_to(TESTS).parts[0] not in ("ray", "rayserve", "k8s"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Radosgw]:
    """A real S3 server for the session."""
    require("S3 server", why_not())
    server = Radosgw(tmp_path_factory.mktemp("radosgw"))
    yield server
    server.stop()


@pytest.fixture
def s3_env(s3: Radosgw, monkeypatch: pytest.MonkeyPatch) -> Radosgw:
    """The S3 server, with this process's environment set to use it."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture(scope="session")
def store_env(request: pytest.FixtureRequest) -> dict[str, str]:
    """The S3 server's address and keys, where there is one: what the processes of a Ray have."""
    return {} if why_not() and not os.environ.get("SIGHTLINE_CI") else dict(request.getfixturevalue("s3").env)


@pytest.fixture(scope="session")
def local_ray(store_env: dict[str, str]) -> Iterator[None]:
    """One Ray for the tests that call the job in this process."""
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
    """A head, a node of two CPUs named `readers`, and one of a CPU and a GPU named `actors`.

    Their processes have a pod's environment: the S3 server's address and keys, where there is one, and Serve's hook. A
    test that ends a node brings up another of its kind. A file has one of its own: idle, it takes 2 GB.
    """
    with RayCluster({**store_env, internals.PROXY_CALLBACK: CALLBACK_PATH}) as cluster:
        cluster.add_worker("readers", 2)
        cluster.add_worker("actors", 1, gpus=1)
        yield cluster
