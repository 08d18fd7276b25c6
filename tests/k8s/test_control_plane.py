"""The overlays on a real control plane with KubeRay's real operator. Runs only if their programs are installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.support.control_plane import ControlPlane, KubeObject, Nodes, Ray
from tests.k8s.support.schemas import ROOT, render

OVERLAYS = ROOT / "k8s/overlays"
OF_A_RUN = {"ray.io/originated-from-crd": "RayJob"}


class Cluster:
    """The control plane, the simulated nodes and the simulated Ray."""

    def __init__(self, plane: ControlPlane, nodes: Nodes, ray: Ray) -> None:
        self.plane, self.nodes, self.ray = plane, nodes, ray

    def apply(self, folder: Path) -> None:
        """Apply an overlay as `kubectl apply -k` does. Fails if an object is refused, or admitted with a warning."""
        self.plane.apply(render(folder))

    def run_now(self, name: str) -> None:
        """Start a nightly run now, with the README's command."""
        self.plane.kubectl("-n", "sightline", "create", "job", "--from=cronjob/nightly", name)

    def end(self, job: str) -> str:
        """Wait until a Job has ended, and return its condition: Complete or Failed."""
        return str(self.plane.wait(f"the end of Job {job}", lambda: _ended(self.job(job)), 90))

    def job(self, name: str) -> KubeObject:
        return self.plane.call("GET", f"/apis/batch/v1/namespaces/sightline/jobs/{name}")

    def pod_of(self, job: str) -> KubeObject:
        """Return a running pod of a Job."""

        def find() -> list[KubeObject]:
            pods = self.plane.list("pods", **{"batch.kubernetes.io/job-name": job})
            return [pod for pod in pods if pod["status"]["phase"] == "Running" and not _leaves(pod)]

        found: KubeObject = self.plane.wait(f"a pod of {job}", find)[0]
        return found

    def evict(self, pod: str) -> int:
        """Request an eviction as `kubectl drain` does, and return the status."""
        path = f"/api/v1/namespaces/sightline/pods/{pod}/eviction"
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": "sightline"}}
        response = self.plane.client.post(path, json=body)
        return response.status_code

    def submitted(self, count: int) -> None:
        self.plane.wait(f"{count} jobs submitted", lambda: len(self.ray.submitted) >= count)

    def events(self, reason: str) -> list[str]:
        return [event["message"] for event in self.plane.list("events") if event["reason"] == reason]


def _ended(job: KubeObject) -> str | None:
    conditions = job["status"].get("conditions", [])
    return next((c["type"] for c in conditions if c["status"] == "True" and c["type"] in ("Complete", "Failed")), None)


def _leaves(pod: KubeObject) -> bool:
    return "deletionTimestamp" in pod["metadata"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with ControlPlane(tmp_path) as plane, Ray() as ray, Nodes(plane, ray) as nodes:
        yield Cluster(plane, nodes, ray)


def test_a_night_starts_on_schedule(cluster: Cluster) -> None:
    """The CronJob creates a Job, and the operator creates objects for its RayJob. Their names do not collide."""
    cluster.ray.drivers = [0]
    cluster.apply(OVERLAYS / "gpu")
    patch = json.dumps({"spec": {"schedule": "* * * * *"}})
    cluster.plane.kubectl("-n", "sightline", "patch", "cronjob", "nightly", "-p", patch)
    (job,) = cluster.plane.wait("the nightly Job", lambda: cluster.plane.list("jobs"), 90)
    patch = json.dumps({"spec": {"suspend": True}})
    cluster.plane.kubectl("-n", "sightline", "patch", "cronjob", "nightly", "-p", patch)
    assert cluster.end(job["metadata"]["name"]) == "Complete"
    (made,) = cluster.plane.list("rayjobs")
    assert made["status"]["jobDeploymentStatus"] == "Complete"
    assert not cluster.events("FailedToCreateRayJobSubmitter")
    assert not cluster.events("FailedCreate")  # Pod Security refused no pod
    # The operator deletes the cluster, and keeps the driver's log.
    cluster.plane.wait("no Ray cluster", lambda: not cluster.plane.list("rayclusters", **OF_A_RUN), 120)
    assert len(cluster.plane.list("jobs")) == 2
    cluster.plane.kubectl("-n", "sightline", "delete", "job", job["metadata"]["name"])
    cluster.plane.wait("nothing left", lambda: not cluster.plane.list("jobs") and not cluster.plane.list("rayjobs"))


def test_failed_attempts_are_retried_if_that_can_help(cluster: Cluster) -> None:
    cluster.apply(OVERLAYS / "cpu")
    cluster.ray.drivers = [137, 1, 0, 2, "stopped"]
    cluster.run_now("tries")
    assert cluster.end("tries") == "Complete"
    assert cluster.ray.submitted == ["tries-1", "tries-2", "tries-3"]
    cluster.run_now("setting")
    assert cluster.end("setting") == "Failed"
    assert "not tried again, a setting" in cluster.nodes.printed[-1]
    cluster.run_now("stopped")
    assert cluster.end("stopped") == "Failed"
    assert cluster.ray.submitted[3:] == ["setting-1", "stopped-1"]


def test_an_evicted_launcher_is_replaced_and_two_runs_wait_for_each_other(cluster: Cluster) -> None:
    cluster.apply(OVERLAYS / "cpu")
    cluster.run_now("first")
    cluster.submitted(1)
    evicted: set[str] = set()
    for _ in range(2):
        pod = cluster.pod_of("first")["metadata"]["name"]
        assert cluster.evict(pod) == 201
        evicted.add(pod)
        cluster.plane.wait("another pod", lambda: cluster.pod_of("first")["metadata"]["name"] not in evicted)
    cluster.run_now("second")
    cluster.pod_of("second")
    cluster.ray.drivers = [0]
    assert cluster.end("first") == "Complete"
    assert not cluster.job("first")["status"].get("failed")
    cluster.submitted(2)
    assert cluster.ray.submitted == ["first-1", "second-1"]
    cluster.ray.drivers = [0, 0]
    assert cluster.end("second") == "Complete"
    assert "waiting for its end" in cluster.nodes.printed[-1]


def test_a_night_that_overruns_ends_at_its_deadline(cluster: Cluster) -> None:
    """With a deadline of about a minute instead of eleven hours, because this clock cannot be moved."""
    cluster.apply(OVERLAYS / "cpu")
    patch = json.dumps({"spec": {"jobTemplate": {"activeDeadlineSeconds": 640}}})
    cluster.plane.kubectl("-n", "sightline", "patch", "raycronjob", "nightly", "--type=merge", "-p", patch)
    cluster.run_now("late")
    cluster.submitted(1)
    (made,) = cluster.plane.list("rayjobs")
    assert 600 < made["spec"]["activeDeadlineSeconds"] <= 640
    patch = json.dumps({"spec": {"activeDeadlineSeconds": 5}})
    cluster.plane.kubectl("-n", "sightline", "patch", "rayjob", "late-1", "--type=merge", "-p", patch)
    assert cluster.end("late") == "Failed"
    assert "not tried again, its time is over" in cluster.nodes.printed[-1]
    cluster.plane.wait("no Ray cluster", lambda: not cluster.plane.list("rayclusters", **OF_A_RUN), 120)


def test_a_labelling_run_succeeds(cluster: Cluster) -> None:
    cluster.ray.drivers = [137, 0]
    cluster.apply(OVERLAYS / "gpu")
    cluster.apply(OVERLAYS / "labelling-gpu")
    assert cluster.end("labelling-run") == "Complete"
    assert len(cluster.ray.submitted) == 2


def endpoint(cluster: Cluster) -> KubeObject:
    (found,) = cluster.plane.list("rayservices")
    return found


def workers(cluster: Cluster) -> list[str]:
    pods = cluster.plane.list("pods", **{"ray.io/node-type": "worker", "app.kubernetes.io/component": "endpoint"})
    return [pod["metadata"]["name"] for pod in pods if not _leaves(pod)]


def is_ready(cluster: Cluster) -> bool:
    conditions = endpoint(cluster)["status"].get("conditions", [])
    return any((c["type"], c["status"]) == ("Ready", "True") for c in conditions)


def allowed(cluster: Cluster) -> int:
    (budget,) = cluster.plane.list("poddisruptionbudgets")
    return int(budget["status"]["disruptionsAllowed"])


def test_the_endpoint_starts_is_drained_and_updated(cluster: Cluster) -> None:
    cluster.nodes.unready = {"endpoint worker"}
    cluster.apply(OVERLAYS / "cpu")
    cluster.plane.wait("worker pods", lambda: len(workers(cluster)) == 2)
    cluster.plane.wait("the Serve config", lambda: cluster.ray.applications)
    assert cluster.ray.applications[-1]["applications"][0]["import_path"] == "serve.app:build"
    cluster.nodes.unready = set()
    cluster.plane.wait("a ready endpoint", lambda: is_ready(cluster))
    # The budget lets its nodes be drained one after another, never both at the same time.
    cluster.plane.wait("a budget", lambda: allowed(cluster) == 1)
    (budget,) = cluster.plane.list("poddisruptionbudgets")
    assert {c["status"] for c in budget["status"]["conditions"]} == {"True"}
    cluster.nodes.unready = {"endpoint worker"}  # new pods are not ready immediately
    first, second = workers(cluster)
    cluster.nodes.unready = set()
    assert cluster.evict(first) == 201
    assert cluster.evict(second) in (201, 429)
    cluster.plane.wait("two workers again", lambda: len(workers(cluster)) == 2 and allowed(cluster) == 1)
    # A changed serve.yaml is sent to the running cluster. A changed pod starts a second cluster, and the first stays
    # until the second is ready.
    before = endpoint(cluster)["status"]["activeServiceStatus"]["rayClusterName"]
    config = endpoint(cluster)["spec"]["serveConfigV2"].replace("requests_per_minute: 600", "requests_per_minute: 60")
    sent = len(cluster.ray.applications)
    change(cluster, {"serveConfigV2": config})
    cluster.plane.wait("the changed config", lambda: len(cluster.ray.applications) > sent)
    assert '"requests_per_minute": 60' in json.dumps(cluster.ray.applications[-1])
    assert endpoint(cluster)["status"]["activeServiceStatus"]["rayClusterName"] == before
    cluster.nodes.unready = {"endpoint worker"}
    groups = endpoint(cluster)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    groups[0]["template"]["spec"]["containers"][0]["image"] = "sightline:0.1.1-cpu"
    change(cluster, {"rayClusterConfig": {"workerGroupSpecs": groups}})
    cluster.plane.wait(
        "a second cluster", lambda: endpoint(cluster)["status"].get("pendingServiceStatus", {}).get("rayClusterName")
    )
    assert endpoint(cluster)["status"]["activeServiceStatus"]["rayClusterName"] == before
    cluster.nodes.unready = set()
    cluster.plane.wait(
        "the second cluster to take over",
        lambda: endpoint(cluster)["status"]["activeServiceStatus"]["rayClusterName"] != before,
    )


def change(cluster: Cluster, spec: dict[str, Any]) -> None:
    patch = json.dumps({"spec": spec})
    cluster.plane.kubectl("-n", "sightline", "patch", "rayservice", "endpoint", "--type=merge", "-p", patch)


@pytest.mark.parametrize("component", sorted(path.name for path in (ROOT / "k8s/components").iterdir()))
def test_every_component_is_admitted(cluster: Cluster, component: str, tmp_path: Path) -> None:
    """Each component added to the GPU overlay is admitted without an unknown field, a refused value or a warning."""
    for folder in ("k8s", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    path = tmp_path / "k8s/overlays/gpu/kustomization.yaml"
    overlay = yaml.safe_load(path.read_text())
    plain = render(path.parent)
    added = f"../../components/{component}"
    overlay["components"] = [*(given for given in overlay.get("components", []) if given != added), added]
    path.write_text(yaml.safe_dump(overlay))
    objects = render(path.parent)
    assert component == "gpu" or objects != plain
    cluster.plane.apply(objects)
