"""The network policies: which pods may connect to which, evaluated as a network plugin does."""

from __future__ import annotations

import ipaddress
import os
from typing import Any

import pytest
import yaml

from tests.k8s.support.schemas import ROOT, find_kubectl, render

pytestmark = pytest.mark.skipif(
    not find_kubectl() and not os.environ.get("SIGHTLINE_CI"), reason="kubectl is not installed"
)


@pytest.fixture(scope="module")
def policies() -> list[dict[str, Any]]:
    """The rendered policies, which are the same in both overlays."""
    return [obj for obj in render(ROOT / "k8s/overlays/gpu") if obj["kind"] == "NetworkPolicy"]


def allows(policies: list[dict[str, Any]], source: dict[str, Any], target: dict[str, Any], port: int) -> bool:
    """Whether the policies allow a connection. Source and target: a pod {"labels", "namespace", ...} or {"address"}."""

    def side(kind: str, pod: dict[str, Any], peer: dict[str, Any]) -> bool:
        if "address" in pod:
            return True
        chosen = [
            p
            for p in policies
            if kind in p["spec"]["policyTypes"]
            and pod["namespace"] == "sightline"
            and selects(p["spec"]["podSelector"], pod)
        ]
        rules = [rule for p in chosen for rule in p["spec"].get(kind.lower(), [])]
        return not chosen or any(
            any(matches(entry, peer) for entry in rule["from" if kind == "Ingress" else "to"])
            and (
                "ports" not in rule
                or any(entry["port"] <= port <= entry.get("endPort", entry["port"]) for entry in rule["ports"])
            )
            for rule in rules
        )

    return side("Egress", source, target) and side("Ingress", target, source)


def selects(selector: dict[str, Any], pod: dict[str, Any]) -> bool:
    labels = pod["labels"]
    expressions = selector.get("matchExpressions", [])
    assert all(e["operator"] == "In" for e in expressions)
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items()) and all(
        labels.get(e["key"]) in e["values"] for e in expressions
    )


def matches(entry: dict[str, Any], peer: dict[str, Any]) -> bool:
    if "ipBlock" in entry:
        block = entry["ipBlock"]
        return "address" in peer and (
            ipaddress.ip_address(peer["address"]) in ipaddress.ip_network(block["cidr"])
            and not any(
                ipaddress.ip_address(peer["address"]) in ipaddress.ip_network(hole) for hole in block.get("except", [])
            )
        )
    if "address" in peer:
        return False
    namespace = entry.get("namespaceSelector")
    here = (
        peer["namespace"] == "sightline"
        if namespace is None
        else selects(namespace, {"labels": peer["namespace_labels"]})
    )
    return here and selects(entry.get("podSelector", {}), peer)


def pod_of(component: str, node: str | None = None) -> dict[str, Any]:
    labels = {"app.kubernetes.io/component": component}
    if node:
        labels |= {"ray.io/is-ray-node": "yes", "ray.io/node-type": node}
    if node == "head" or component == "launcher":
        labels["sightline/kubernetes-api"] = "yes"
    return {"labels": labels, "namespace": "sightline", "namespace_labels": {}}


def elsewhere(namespace: str, labels: dict[str, str] | None = None, **about: str) -> dict[str, Any]:
    names = {"kubernetes.io/metadata.name": namespace, **{key.replace("_", "/"): value for key, value in about.items()}}
    return {"labels": labels or {}, "namespace": namespace, "namespace_labels": names}


HEAD, WORKER = pod_of("endpoint", "head"), pod_of("endpoint", "worker")
JOB_HEAD, JOB_WORKER, SUBMITTER = pod_of("batch", "head"), pod_of("batch", "worker"), pod_of("submitter")
OPERATOR = elsewhere("operators", {"app.kubernetes.io/name": "kuberay-operator"})
CLIENT, OTHER = elsewhere("shop", sightline_client="yes"), elsewhere("shop")
METRICS = elsewhere("monitoring", sightline_metrics="yes")
DNS = elsewhere("kube-system", {"k8s-app": "kube-dns"})
S3, METADATA = {"address": "52.216.1.1"}, {"address": "169.254.169.254"}


@pytest.mark.parametrize(
    ("source", "target", "port", "allowed"),
    [
        *[(WORKER, HEAD, port, True) for port in (6379, 6380, 6381, 6382, 6383, 8265, 10002, 19999, 52365)],
        *[(HEAD, WORKER, port, True) for port in (6380, 10002)],
        # The kernel chooses the ports of Serve's gRPC between replicas and of Ray's own servers.
        *[(WORKER, WORKER, port, True) for port in (32768, 45555, 60999)],
        *[(JOB_WORKER, JOB_WORKER, port, True) for port in (6381, 32768, 60999)],
        (JOB_WORKER, WORKER, 45555, False),
        (CLIENT, WORKER, 45555, False),
        (JOB_WORKER, JOB_HEAD, 6379, True),
        (JOB_WORKER, HEAD, 6379, False),
        (WORKER, JOB_HEAD, 8265, False),
        (SUBMITTER, JOB_HEAD, 8265, True),
        (SUBMITTER, JOB_HEAD, 6379, False),
        (SUBMITTER, HEAD, 8265, False),
        (SUBMITTER, S3, 443, False),
        (OPERATOR, HEAD, 8265, True),
        (OPERATOR, JOB_HEAD, 8265, True),
        (OPERATOR, HEAD, 6379, False),
        (CLIENT, WORKER, 8000, True),
        (CLIENT, WORKER, 8265, False),
        (CLIENT, HEAD, 8265, False),
        (CLIENT, JOB_HEAD, 8000, False),
        (OTHER, WORKER, 8000, False),
        (OTHER, HEAD, 8265, False),
        ({"address": "203.0.113.9"}, HEAD, 8265, False),
        ({"address": "203.0.113.9"}, WORKER, 8000, False),
        (METRICS, WORKER, 8080, True),
        (METRICS, HEAD, 44217, True),
        (METRICS, HEAD, 8265, False),
        *[(pod, DNS, 53, True) for pod in (HEAD, WORKER, JOB_WORKER, SUBMITTER, pod_of("launcher"))],
        (WORKER, elsewhere("kube-system"), 53, False),
        *[(pod, S3, 443, True) for pod in (WORKER, JOB_HEAD, JOB_WORKER)],
        (WORKER, S3, 80, False),
        (JOB_WORKER, METADATA, 80, False),
        (JOB_WORKER, METADATA, 443, False),
        (JOB_HEAD, {"address": "10.0.0.1"}, 6443, True),
        (JOB_WORKER, {"address": "10.0.0.1"}, 6443, False),
        (pod_of("launcher"), {"address": "10.0.0.1"}, 443, True),
        (pod_of("launcher"), JOB_HEAD, 8265, False),
    ],
)
def test_only_needed_connections_are_allowed(
    policies: list[dict[str, Any]], source: Any, target: Any, port: int, allowed: bool
) -> None:
    assert allows(policies, source, target, port) is allowed


REDIS = pod_of("redis")
CLEANUP = {**WORKER, "labels": {**WORKER["labels"], "ray.io/node-type": "redis-cleanup"}}
EKS, GKE = {"address": "169.254.170.23"}, {"address": "169.254.169.252"}


@pytest.mark.parametrize(
    ("component", "source", "target", "port", "allowed"),
    [
        ("ha", HEAD, REDIS, 6379, True),
        ("ha", CLEANUP, REDIS, 6379, True),
        ("ha", WORKER, REDIS, 6379, False),
        ("ha", JOB_HEAD, REDIS, 6379, False),
        ("ha", CLIENT, REDIS, 6379, False),
        ("ha", REDIS, S3, 443, False),
        ("eks-pod-identity", JOB_WORKER, EKS, 80, True),
        ("eks-pod-identity", SUBMITTER, EKS, 80, False),
        ("eks-pod-identity", JOB_WORKER, METADATA, 80, False),
        ("gke-workload-identity", JOB_WORKER, GKE, 988, True),
        ("gke-workload-identity", JOB_WORKER, METADATA, 80, True),
        ("gke-workload-identity", SUBMITTER, METADATA, 80, False),
    ],
)
def test_a_component_allows_only_its_own_connections(
    policies: list[dict[str, Any]], component: str, source: Any, target: Any, port: int, allowed: bool
) -> None:
    assert not allows(policies, source, target, port)
    for path in (ROOT / "k8s/components" / component).glob("*.yaml"):
        for obj in yaml.safe_load_all(path.read_text()):
            if isinstance(obj, dict) and obj["kind"] == "NetworkPolicy":
                policies = [*policies, obj]
    assert allows(policies, source, target, port) is allowed
