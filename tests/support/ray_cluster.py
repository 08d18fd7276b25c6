"""A real Ray cluster of several nodes on this machine. Each node is a `ray start` with its own folder and resources.

Ray's token authentication is on, as on Kubernetes. The nodes share a loopback address and the machine's cores; their
CPUs and GPUs are numbers that Ray counts. A node is ended by the ids of its processes; no other process is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.support.ports import free_port

BIN = Path(sys.executable).parent
SIGHTLINE = str(BIN / "sightline")
STORE_BYTES = 300 * 2**20
START_SECONDS = 60


class Node:
    """One node: its `ray start --block` and the processes below it."""

    def __init__(self, name: str, arguments: list[str], env: dict[str, str]) -> None:
        self.name = name
        self.agent_port, self.metrics_port = free_port(), free_port()
        # The folder contains Ray's sockets, and the path of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix=f"ray-{name}-", dir="/tmp"))
        command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", f"--temp-dir={self.folder}"]
        command += [f"--dashboard-agent-listen-port={self.agent_port}", f"--object-store-memory={STORE_BYTES}"]
        command += [f"--metrics-export-port={self.metrics_port}"]
        with open(self.folder / "start.log", "wb") as log:
            self.process = subprocess.Popen([*command, *arguments], env=env, stdout=log, stderr=log)

    def processes(self) -> list[psutil.Process]:
        """Return the node's processes, `ray start` first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.process.pid)
            return [main, *main.children(recursive=True)]
        return []

    def kill(self) -> None:
        """Send SIGKILL to all processes of the node at once, as if the machine lost its power."""
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()  # so that none sees another end, and none starts a new process
        processes += [process for process in self.processes() if process not in processes]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(START_SECONDS)
        psutil.wait_procs(processes, START_SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)

    def metrics(self) -> str:
        """Return the node's metrics in Prometheus' format; an empty string if the node does not respond."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as response:
                return str(response.read().decode())
        except OSError:
            return ""

    def log(self) -> str:
        """Return what `ray start` printed."""
        return (self.folder / "start.log").read_text(errors="replace")


class RayCluster:
    """A cluster: a head node without CPUs, and the workers that a test adds. Use it in a `with` block.

    With `node_types` (`available_node_types` in a cluster's YAML file) Ray's autoscaler adds and removes nodes of these
    types. Those nodes are processes below the head.
    """

    def __init__(self, env: dict[str, str] | None = None, node_types: dict[str, Any] | None = None) -> None:
        self._node_types = node_types
        self._folder = tempfile.TemporaryDirectory()
        self.env = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RAY_metrics_report_interval_ms": "500",
            **(env or {}),
        }
        self.env.pop("RAY_ADDRESS", None)
        self.port, self.dashboard_port = free_port(), free_port()
        self.nodes: list[Node] = []

    def __enter__(self) -> RayCluster:
        try:
            ports = [f"--port={self.port}", f"--dashboard-port={self.dashboard_port}"]
            ports += [f"--ray-client-server-port={free_port()}"]
            if self._node_types is not None:
                ports.append(f"--autoscaling-config={self._write_autoscaling()}")
            self._add("head", ["--head", "--num-cpus=0", *ports])
            self._wait_for_another(set())
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """The address for RAY_ADDRESS and for `ray.address` in a job."""
        return f"127.0.0.1:{self.port}"

    @property
    def dashboard(self) -> str:
        """The URL of the dashboard, which is also that of the job API and of Ray Serve's API."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def add_worker(self, name: str, cpus: int, *, gpus: int = 0) -> Node:
        """Start a node with these resources, and return it once the cluster counts it."""
        before = self._alive_ids()  # this may include nodes that were just killed, which the head notices later
        node = self._add(name, [f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}"])
        self._wait_for_another(before)
        return node

    def named(self, name: str) -> Node:
        """Return the newest node with this name."""
        return next(node for node in reversed(self.nodes) if node.name == name)

    def kill(self, node: Node) -> None:
        """Kill a node without notice to the cluster."""
        node.kill()
        self.nodes.remove(node)

    def run(self, *command: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a program that joins the cluster, and wait for its end."""
        return subprocess.run(
            command,
            env={**self.env, "RAY_ADDRESS": self.address, **env},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(self, *command: str, **env: str) -> subprocess.Popen[str]:
        """Start a program that joins the cluster, and return its process."""
        environment = {**self.env, "RAY_ADDRESS": self.address, **env}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def ask(self, path: str) -> Any:
        """Send a GET request with the cluster's token to the dashboard's API. Returns the JSON of the response."""
        token = self.env["RAY_AUTH_TOKEN"]
        request = urllib.request.Request(f"{self.dashboard}{path}", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def alive(self) -> list[dict[str, Any]]:
        """Return the nodes that the head considers alive."""
        nodes = self.ask("/api/v0/nodes")["data"]["result"]["result"]
        return [node for node in nodes if node["state"] == "ALIVE"]

    def stop(self) -> None:
        """Kill every node."""
        while self.nodes:
            self.nodes.pop().kill()
        self._folder.cleanup()

    def logs(self) -> str:
        """Return what `ray start` printed on every node."""
        return "\n".join(f"--- {node.name}\n{node.log()}" for node in self.nodes)

    def _write_autoscaling(self) -> Path:
        """Write the autoscaler's configuration, as `ray up` would, and set the environment that it needs.

        The new nodes are processes on this machine, which Ray's fake node provider starts.
        """
        self.env |= {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }
        provider = {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": self.address,
        }
        head = {"resources": {}, "node_config": {}, "max_workers": 0}
        config = {
            "cluster_name": "test",
            "max_workers": 8,
            "provider": provider,
            "idle_timeout_minutes": 5 / 60,
            "available_node_types": {"ray.head.default": head, **(self._node_types or {})},
            "head_node_type": "ray.head.default",
            **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
            **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            "upscaling_speed": 1.0,
        }
        path = Path(self._folder.name) / "cluster.json"
        path.write_text(json.dumps(config))
        return path

    def _add(self, name: str, arguments: list[str]) -> Node:
        node = Node(name, arguments, self.env)
        self.nodes.append(node)
        return node

    def _alive_ids(self) -> set[str]:
        return {node["node_id"] for node in self.alive()}

    def _wait_for_another(self, before: set[str]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if self._alive_ids() - before:
                    return
            except OSError:
                pass
            if time.monotonic() > deadline:
                raise RuntimeError(f"no new node after {START_SECONDS} s\n{self.logs()}")
            time.sleep(0.2)
