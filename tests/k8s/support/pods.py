"""Pods as network namespaces. A node between them forwards packets, and nftables filters by the network policies.

The connections are real. The translation of the policies into a filter is this module's own and follows the API's
documentation; no network plugin is involved.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.conftest import require
from tests.k8s.support.schemas import ROOT, find_kubectl, render
from tests.k8s.test_network_policies import (
    CLIENT,
    DNS,
    HEAD,
    JOB_HEAD,
    JOB_WORKER,
    METADATA,
    METRICS,
    OPERATOR,
    OTHER,
    S3,
    SUBMITTER,
    WORKER,
    matches,
    selects,
)

PODS: dict[str, dict[str, Any]] = {
    "head": HEAD,
    "worker": WORKER,
    "worker2": WORKER,
    "jobhead": JOB_HEAD,
    "jobworker": JOB_WORKER,
    "jobworker2": JOB_WORKER,
    "submitter": SUBMITTER,
    "operator": OPERATOR,
    "client": CLIENT,
    "other": OTHER,
    "metrics": METRICS,
    "dns": DNS,
    "s3": S3,
    "metadata": METADATA,
    "internet": {"address": "203.0.113.9"},
}
LISTENING = (53, 80, 443, 6379, 6443, 8000, 8080, 8265, 10002)
SERVER = """
import json, selectors, socket, sys
ports = []
chosen = selectors.DefaultSelector()
for port in [*json.loads(sys.argv[1]), 0]:
    server = socket.create_server(("", port))
    chosen.register(server, selectors.EVENT_READ)
    ports.append(server.getsockname()[1])
print(ports[-1], flush=True)
while True:
    for key, _ in chosen.select():
        key.fileobj.accept()[0].close()
"""
CLIENT_CODE = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def reach(target):
    try:
        socket.create_connection(target, timeout=1).close()
        return True
    except OSError:
        return False
with ThreadPoolExecutor(16) as pool:
    print(json.dumps(list(pool.map(reach, map(tuple, json.loads(sys.argv[1]))))))
"""


def shell(*command: str, text: str | None = None) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def compile_rules(policies: list[dict[str, Any]], addresses: dict[str, str]) -> str:
    """Return the node's nftables rules: policies of both the source and the target must allow a new connection."""
    lines = []
    for kind, bit, here, there in (("Egress", 1, "saddr", "daddr"), ("Ingress", 2, "daddr", "saddr")):
        for name, pod in PODS.items():
            chosen = [
                policy["spec"]
                for policy in policies
                if kind in policy["spec"]["policyTypes"]
                and pod.get("namespace") == "sightline"
                and selects(policy["spec"]["podSelector"], pod)
            ]
            if not chosen:
                lines.append(f"ip {here} {addresses[name]} meta mark set meta mark or {bit}")
            for rule in (rule for spec in chosen for rule in spec.get(kind.lower(), [])):
                entries = rule["from" if kind == "Ingress" else "to"]
                ports = [
                    f"{entry['protocol'].lower()} dport {entry['port']}-{entry.get('endPort', entry['port'])} "
                    for entry in rule.get("ports", [])
                ]
                for peer, other in PODS.items():
                    if any(matches(entry, other) for entry in entries):
                        for port in ports or [""]:
                            match = f"ip {here} {addresses[name]} ip {there} {addresses[peer]} {port}"
                            lines.append(f"{match}meta mark set meta mark or {bit}")
    rules = "\n    ".join(["ct state established,related accept", *lines, "meta mark and 3 == 3 accept"])
    chain = f"type filter hook forward priority 0; policy drop;\n    {rules}"
    return f"table inet pods {{\n  chain forward {{\n    {chain}\n  }}\n}}\n"


class Network:
    """Network namespaces with unique names, which `close` deletes."""

    def __init__(self) -> None:
        self.prefix = f"sl{os.getpid()}"
        self.node = f"{self.prefix}-node"
        self.addresses = {name: pod.get("address", f"10.77.0.{n + 1}") for n, (name, pod) in enumerate(PODS.items())}
        self.made: list[str] = []
        self.servers: list[subprocess.Popen[str]] = []
        self.chosen: dict[str, int] = {}

    def start(self, policies: list[dict[str, Any]], listeners: Iterable[str]) -> None:
        """Create the pods. The pods in `listeners` listen on the ports that Ray, Serve and S3 use."""
        self._add(self.node)
        for number, (name, address) in enumerate(self.addresses.items()):
            space, link = f"{self.prefix}-{name}", f"p{number}"
            self._add(space)
            shell("ip", "-n", self.node, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            shell("ip", "-n", space, "address", "add", f"{address}/32", "dev", "eth0")
            shell("ip", "-n", space, "link", "set", "eth0", "up")
            shell("ip", "-n", space, "link", "set", "lo", "up")
            shell("ip", "-n", self.node, "address", "add", f"10.78.{number}.1/32", "dev", link)
            shell("ip", "-n", self.node, "link", "set", link, "up")
            shell("ip", "-n", self.node, "route", "add", f"{address}/32", "dev", link)
            shell("ip", "-n", space, "route", "add", f"10.78.{number}.1/32", "dev", "eth0")
            shell("ip", "-n", space, "route", "add", "default", "via", f"10.78.{number}.1")
        shell("ip", "netns", "exec", self.node, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        shell("ip", "netns", "exec", self.node, "nft", "-f", "-", text=compile_rules(policies, self.addresses))
        names = list(listeners)
        for name in names:
            command = [*self.inside(name), sys.executable, "-c", SERVER, json.dumps(LISTENING)]
            self.servers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for name, server in zip(names, self.servers, strict=True):
            assert server.stdout
            self.chosen[name] = int(server.stdout.readline())

    def inside(self, name: str) -> list[str]:
        """Return the words to put before a command that runs in a pod."""
        return ["ip", "netns", "exec", f"{self.prefix}-{name}"]

    def reaches(self, source: str, *targets: tuple[str, int]) -> list[bool]:
        """Return which connections succeed. Port 0 is the port that the kernel chose for the target."""
        wanted = [(self.addresses[name], port or self.chosen[name]) for name, port in targets]
        command = [*self.inside(source), sys.executable, "-c", CLIENT_CODE, json.dumps(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        found: list[bool] = json.loads(done.stdout)
        return found

    def _add(self, name: str) -> None:
        shell("ip", "netns", "add", name)
        self.made.append(name)

    def close(self) -> None:
        for server in self.servers:
            server.kill()
            server.wait()
            assert server.stdout
            server.stdout.close()
        for name in self.made:
            shell("ip", "netns", "delete", name)


@contextmanager
def open_network(listeners: Iterable[str]) -> Iterator[Network]:
    """Create the pods with the GPU overlay's policies, which are the same in all overlays, until the block ends."""
    missing = [tool for tool in ("ip", "nft", "sysctl") if not shutil.which(tool)]
    require("packet filter", f"{missing[0]} is not installed" if missing else None)
    require("packet filter", None if os.geteuid() == 0 else "only root may make network namespaces")
    require("kubectl", None if find_kubectl() else "it is not installed")
    network = Network()
    try:
        policies = [obj for obj in render(ROOT / "k8s/overlays/gpu") if obj["kind"] == "NetworkPolicy"]
        network.start(policies, listeners)
        yield network
    finally:
        network.close()
