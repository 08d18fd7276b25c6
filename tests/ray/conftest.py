"""The cluster of several nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serve.rayserve.proxy import CALLBACK, CALLBACK_PATH
from tests.raycluster import RayCluster


@pytest.fixture(scope="module")
def ray_cluster(store_env: dict[str, str]) -> Iterator[RayCluster]:
    """A head, a node of two CPUs named `readers`, and one of a CPU and a GPU named `actors`.

    Their processes have a pod's environment: the S3 server's address and keys, where there is one, and Serve's hook. A
    test that ends a node brings up another of its kind. A file has one of its own: idle, it takes 2 GB.
    """
    with RayCluster({**store_env, CALLBACK: CALLBACK_PATH}) as cluster:
        cluster.add_worker("readers", 2)
        cluster.add_worker("actors", 1, gpus=1)
        yield cluster
