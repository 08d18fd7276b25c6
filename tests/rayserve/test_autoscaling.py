"""The endpoint on a cluster with Ray's autoscaler, which KubeRay also uses: the number of nodes follows the load."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.k8s.support.schemas import ROOT
from tests.rayserve.test_endpoint import BODY, load
from tests.support.ports import free_port
from tests.support.ray_cluster import STORE_BYTES, RayCluster

NODE = {"resources": {"CPU": 2, "object_store_memory": STORE_BYTES}, "node_config": {}}
DELAYS = {"upscale_delay_s": 1, "downscale_delay_s": 3}
UP_SECONDS, DOWN_SECONDS = 90, 120
"""Timeouts. Scaling up: replicas are requested, a node starts, processes load torch on a busy machine. Scaling down:
replicas and the node are removed after the clients have left and `idle_timeout_minutes` have passed."""


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    types = {"endpoint": {**NODE, "min_workers": 1, "max_workers": 2}}
    with RayCluster({"PYTHONPATH": str(ROOT)}, types) as cluster:
        yield cluster


@pytest.mark.alone
def test_nodes_follow_the_load(cluster: RayCluster, tmp_path: Path) -> None:
    """A node has room for one replica and one ingress. The load makes both deployments grow, onto a second node."""
    settings = yaml.safe_load((ROOT / "configs/serve.yaml").read_text())
    port = free_port()
    settings["http_options"] = {"host": "127.0.0.1", "port": port}
    settings["proxy_location"] = "HeadOnly"  # here the nodes share one address and therefore one port
    (application,) = settings["applications"]
    application["import_path"] = "tests.support.slow_endpoint:build"
    scaling = {"min": 1, "max": 2, "num_cpus": 1, **DELAYS}
    application["args"] |= {"replicas": scaling, "ingress": {**scaling, "decoders": 1}}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(settings))

    def count() -> tuple[int, int, int]:
        """Return the numbers of worker nodes, of running model replicas and of running ingresses."""
        found = cluster.ask("/api/serve/applications/")["applications"].get("sightline", {})
        assert found.get("status") != "DEPLOY_FAILED", found["message"]
        replicas = [
            sum(one["state"] == "RUNNING" for one in found.get("deployments", {}).get(name, {}).get("replicas", []))
            for name in ("model", "ingress")
        ]
        return len(cluster.alive()) - 1, replicas[0], replicas[1]

    def wait_for(wanted: tuple[int, int, int], seconds: float) -> float:
        start = time.monotonic()
        while count() != wanted:
            assert time.monotonic() - start < seconds, f"{count()} and not {wanted} after {seconds} s"
            time.sleep(0.5)
        return time.monotonic() - start

    wait_for((1, 0, 0), 60)
    done = cluster.run("serve", "deploy", "--address", cluster.dashboard, str(tmp_path / "serve.yaml"))
    assert done.returncode == 0, done.stderr
    wait_for((1, 1, 1), 180)
    url = f"http://127.0.0.1:{port}"
    with load(url, 80) as found:
        wait_for((2, 2, 2), UP_SECONDS)
    with load(url, 1) as after:  # one client keeps sending while replicas and the node are removed
        wait_for((1, 1, 1), DOWN_SECONDS)
    assert [*found.errors, *after.errors] == []
    assert found.statuses().keys() <= {200, 429}, found.statuses()
    assert after.statuses().keys() == {200}, after.statuses()
    assert httpx.post(f"{url}/v1/classify", json=BODY, timeout=60).status_code == 200
