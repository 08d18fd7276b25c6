"""Real Ray clusters in network namespaces with the network policies active: one for the endpoint, one for the job."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
import yaml

from serve.admission.auth import new_key
from serve.rayserve import haproxy, internals
from serve.rayserve.proxy import CALLBACK_PATH
from tests.k8s.support.pods import PODS, Network, open_network
from tests.k8s.support.schemas import ROOT
from tests.ray.test_cluster import PER_TAR, make_tars
from tests.support.checkpoints import make_siglip
from tests.support.endpoint import data_uri, shape_png
from tests.support.ray_cluster import BIN, SIGHTLINE, STORE_BYTES

RAY_PODS = ("head", "worker", "worker2", "jobhead", "jobworker", "jobworker2")
pytestmark = pytest.mark.alone
START_SECONDS = 180
"""How long Ray nodes may take to start: they load many modules, and the machine may be busy."""
SEND = """
import json, sys, urllib.request
url, key, body = sys.argv[1], sys.argv[2], sys.stdin.buffer.read()
headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
with urllib.request.urlopen(urllib.request.Request(url, body or None, headers), timeout=60) as response:
    sys.stdout.write(response.read().decode())
"""


class Pods:
    """Ray nodes in pods. Each has its own folder and environment; they share only the network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.folder = TemporaryDirectory(prefix="sl-", dir="/tmp")
        self.token = secrets.token_hex(16)
        self.started: list[subprocess.Popen[bytes]] = []

    def environment(self, pod: str) -> dict[str, str]:
        own = Path(self.folder.name) / pod
        own.mkdir(exist_ok=True)
        return {
            **os.environ,
            **haproxy.make_environment(own, 30),
            internals.PROXY_CALLBACK: CALLBACK_PATH,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "OMP_NUM_THREADS": "1",
        }

    def start(self, pod: str, *arguments: str) -> None:
        """Run `ray start` in a pod, as KubeRay does."""
        command = [*self.network.inside(pod), str(BIN / "ray"), "start", "--block", "--disable-usage-stats"]
        command += [f"--node-ip-address={self.network.addresses[pod]}", f"--temp-dir={self.folder.name}/{pod}/ray"]
        command += [f"--object-store-memory={STORE_BYTES}", *arguments]
        with open(Path(self.folder.name) / f"{pod}.log", "wb") as log:
            self.started.append(subprocess.Popen(command, env=self.environment(pod), stdout=log, stderr=log))

    def run(self, pod: str, *command: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program in a pod, and return it after its end."""
        return subprocess.run(
            [*self.network.inside(pod), *command],
            env=self.environment(pod),
            input=text,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def send(self, pod: str, url: str, key: str, body: Any = None) -> Any:
        """Send a request from a pod, and return the JSON response. Raises `OSError` if it is not a success."""
        done = self.run(pod, sys.executable, "-c", SEND, url, key, text=json.dumps(body) if body else "")
        if done.returncode:
            raise OSError(done.stderr)
        return json.loads(done.stdout)

    def wait_for(self, head: str, client: str, nodes: int) -> str:
        """Wait until `nodes` nodes have joined, and return the dashboard's URL."""
        url = f"http://{self.network.addresses[head]}:8265"
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                found = self.send(client, f"{url}/api/v0/nodes", self.token)["data"]["result"]["result"]
                if sum(node["state"] == "ALIVE" for node in found) >= nodes:
                    return url
            except OSError:
                pass
            assert time.monotonic() < deadline, (Path(self.folder.name) / f"{head}.log").read_text()
            time.sleep(0.5)

    def close(self) -> None:
        found = [psutil.Process(one.pid) for one in self.started if one.poll() is None]
        found += [child for process in found for child in process.children(recursive=True)]
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, 30)
        for one in self.started:
            one.wait(30)
        self.folder.cleanup()


@pytest.fixture(scope="module")
def pods() -> Iterator[Pods]:
    with open_network([name for name in PODS if name not in RAY_PODS]) as network:
        found = Pods(network)
        try:
            yield found
        finally:
            found.close()


def test_the_endpoint_runs_on_two_pods(pods: Pods, tmp_path: Path) -> None:
    """Ingress and model on different pods: one image travels inside the call, many through the object store."""
    head = f"{pods.network.addresses['head']}:6379"
    pods.start("head", "--head", "--num-cpus=0", "--dashboard-host=0.0.0.0")
    pods.wait_for("head", "operator", 1)
    for pod, resource in (("worker", "front"), ("worker2", "back")):
        pods.start(pod, f"--address={head}", "--num-cpus=2", "--resources", json.dumps({resource: 1}))
    dashboard = pods.wait_for("head", "operator", 3)
    key, line = new_key("shop")
    (tmp_path / "keys").write_text(line + "\n")
    settings = yaml.safe_load((ROOT / "configs/serve.yaml").read_text())
    assert settings["proxy_location"] == "EveryNode"
    settings["applications"][0]["args"] |= {
        "model": {"source": str(make_siglip(tmp_path / "model"))},
        "label_sets": {},
        "replicas": {"num_cpus": 1, "resources": {"back": 1}},
        "ingress": {"num_cpus": 1, "resources": {"front": 1}, "decoders": 1},
        "auth": {"keys_file": str(tmp_path / "keys")},
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(settings))
    done = pods.run("operator", "serve", "deploy", "--address", dashboard, str(tmp_path / "serve.yaml"))
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 120
    while True:
        state = pods.send("operator", f"{dashboard}/api/serve/applications/", pods.token)["applications"]["sightline"]
        if state["status"] == "RUNNING":
            break
        assert state["status"] != "DEPLOY_FAILED", state["message"]
        assert time.monotonic() < deadline, state
        time.sleep(1)
    nodes = {name: one["replicas"][0]["node_ip"] for name, one in state["deployments"].items()}
    assert nodes == {"ingress": pods.network.addresses["worker"], "model": pods.network.addresses["worker2"]}
    url = f"http://{pods.network.addresses['worker']}:8000/v1/classify"
    images = [data_uri(shape_png("red circle", n)) for n in range(32)]
    for count in (1, len(images)):
        response = pods.send("client", url, key, {"images": images[:count], "labels": ["red", "blue"]})
        assert len(response["data"]) == count
    with pytest.raises(OSError, match="timed out"):
        pods.send("other", url, key, {"images": images[:1], "labels": ["red", "blue"]})


def test_the_job_runs_on_two_pods(pods: Pods, tmp_path: Path) -> None:
    head = f"{pods.network.addresses['jobhead']}:6379"
    pods.start("jobhead", "--head", "--num-cpus=0", "--dashboard-host=0.0.0.0")
    pods.wait_for("jobhead", "submitter", 1)
    pods.start("jobworker", f"--address={head}", "--num-cpus=2", "--resources", '{"reads": 2}')
    pods.start("jobworker2", f"--address={head}", "--num-cpus=2", "--resources", '{"tags": 1}')
    dashboard = pods.wait_for("jobhead", "submitter", 3)
    make_tars(tmp_path / "images", 4)
    output = str(tmp_path / "tags")
    config = {
        "input": str(tmp_path / "images"),
        "output": output,
        "labels": ["red circle", "blue star"],
        "model": {"source": "tiny"},
        "actors": {"max": 1, "num_cpus": 1, "resources": {"tags": 1}},
        "max_reject_fraction": 0.1,
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    job = [SIGHTLINE, "tag", str(tmp_path / "job.yaml")]
    done = pods.run("submitter", "ray", "job", "submit", "--address", dashboard, "--", *job)
    assert done.returncode == 0, done.stdout + done.stderr
    report = pods.run("submitter", SIGHTLINE, "verify", output, "--json")
    assert json.loads(report.stdout)["rows_in"] == 4 * PER_TAR, report.stderr
