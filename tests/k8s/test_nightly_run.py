"""Nightly runs on Kubernetes: the rendered objects and the launcher's real process, on simulated controllers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.support.apiserver import ApiServer, KubeObject, Store, seconds_of
from tests.k8s.support.controllers import CronJobs, Disruption, Jobs, RayJobs, condition, make_pods, owner
from tests.k8s.support.schemas import ROOT, find_kubectl, render

pytestmark = pytest.mark.skipif(
    not find_kubectl() and not os.environ.get("SIGHTLINE_CI"), reason="kubectl is not installed"
)


def apply(store: Store, overlay: str) -> None:
    for obj in render(ROOT / "k8s/overlays" / overlay):
        if obj["kind"] != "Namespace":
            store.create(obj)


def apply_to_store(overlay: str) -> tuple[Store, Disruption]:
    store = Store()
    apply(store, overlay)
    return store, Disruption(store)


class Cluster:
    """A cluster with applied overlays, one hour before the CronJob's scheduled time."""

    def __init__(self, folder: Path, *overlays: str) -> None:
        self.store = Store()
        self.api = ApiServer(self.store, folder)
        now = datetime.now(UTC)
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
        self.store.pass_time(midnight + 86400 - now.timestamp())
        for overlay in overlays:
            apply(self.store, overlay)
        self.cron, self.jobs, self.ray = CronJobs(self.store), Jobs(self.store, self.api), RayJobs(self.store)

    def step(self) -> None:
        with self.store.lock:
            for controller in (self.cron, self.jobs, self.ray):
                controller.step()

    def wait_for(self, what: Callable[[], Any], seconds: float = 30) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, (
                self.states(),
                self.store.events[-3:],
                self.jobs.printed,
                self.api.calls[-3:],
            )
            self.step()
            time.sleep(0.02)
        return found

    def states(self) -> list[tuple[str, str]]:
        return [(j["metadata"]["name"], j["status"].get("jobDeploymentStatus", "")) for j in self.store.list("rayjobs")]

    def night(self) -> KubeObject:
        """Move the clock to one o'clock, the scheduled time, and return the night's Job."""
        before = {job["metadata"]["name"] for job in self.store.list("jobs")}
        self.store.pass_time((3600 - self.store.now()) % 86400 + 5)

        def made() -> list[KubeObject]:
            return [j for j in self.store.list("jobs") if j["metadata"]["name"] not in before]

        job: KubeObject = self.wait_for(made)[0]
        return job

    def cron_jobs(self) -> set[str]:
        """Return the names of the Jobs that the CronJob created."""
        (cron,) = self.store.list("cronjobs")
        return {job["metadata"]["name"] for job in self.store.owned("jobs", cron)}

    def end(self, job: KubeObject) -> str:
        """Wait until a Job has ended, and return its condition: Complete or Failed."""
        self.wait_for(lambda: condition(job, "Complete") or condition(job, "Failed"))
        return "Complete" if condition(job, "Complete") else "Failed"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, "gpu", "labelling-gpu")
    cluster.store.delete("jobs", "labelling-run")  # a labelling run starts when its overlay is applied
    with cluster.api:
        yield cluster
        cluster.jobs.close()


def test_a_night_succeeds(cluster: Cluster) -> None:
    cluster.ray.drivers = [0]
    job = cluster.night()
    assert cluster.end(job) == "Complete"
    assert (
        not cluster.store.events
    )  # the submitter's Job and the launcher's have different names, and no schedule was missed
    assert len(cluster.ray.submitted) == 1
    (made,) = cluster.store.list("rayjobs")
    assert made["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    assert all(code < 300 or (code, "rayjobs" in path) == (404, True) for _, path, code in cluster.api.calls)
    cluster.store.pass_time(600)
    cluster.wait_for(lambda: not cluster.store.list("rayclusters"))
    # The driver's log stays as long as the Job is in the history.
    assert cluster.store.get("jobs", made["metadata"]["name"])
    cluster.ray.drivers = [0] * 9
    for _ in range(4):
        assert cluster.end(cluster.night()) == "Complete"
    cluster.step()
    assert len(cluster.store.list("rayjobs")) == 3
    assert not cluster.store.get("rayjobs", made["metadata"]["name"])


def test_a_driver_that_died_is_retried_until_it_succeeds(cluster: Cluster) -> None:
    cluster.ray.drivers = [143, "SubmissionFailed", 0]
    assert cluster.end(cluster.night()) == "Complete"
    assert [name[-2:] for name in cluster.ray.submitted] == ["-1", "-2", "-3"]


def test_a_night_that_keeps_failing_fails(cluster: Cluster) -> None:
    cluster.ray.drivers = [1] * 9
    assert cluster.end(cluster.night()) == "Failed"
    assert len(cluster.ray.submitted) == 3


@pytest.mark.parametrize("code", [2, 3])
def test_an_exit_code_that_no_retry_can_change_is_not_retried(cluster: Cluster, code: int) -> None:
    cluster.ray.drivers = [code] * 9
    assert cluster.end(cluster.night()) == "Failed"
    assert len(cluster.ray.submitted) == 1
    assert "not tried again" in cluster.jobs.printed[0]


def test_a_stopped_job_is_not_retried_and_its_cluster_is_deleted(cluster: Cluster) -> None:
    cluster.ray.drivers = ["stopped"]
    assert cluster.end(cluster.night()) == "Failed"
    assert len(cluster.ray.submitted) == 1
    cluster.store.pass_time(600)
    cluster.wait_for(lambda: not cluster.store.list("rayclusters"))


def test_a_night_that_overruns_ends_before_the_next(cluster: Cluster) -> None:
    """The deadline is for all attempts together, however late the last one begins."""
    job = cluster.night()
    began = seconds_of(job["metadata"]["creationTimestamp"])
    cluster.wait_for(lambda: cluster.ray.submitted)
    cluster.store.pass_time(6 * 3600)
    cluster.ray.drivers = [137]
    cluster.wait_for(lambda: len(cluster.ray.submitted) == 2)
    cluster.store.pass_time(4 * 3600)
    cluster.step()
    assert cluster.states()[-1][1] == "Running"
    cluster.store.pass_time(3600 + 120)
    assert cluster.end(job) == "Failed"
    assert cluster.store.list("rayjobs")[-1]["status"]["reason"] == "DeadlineExceeded"
    assert cluster.store.now() - began < 43200
    assert "its time is over" in cluster.jobs.printed[0]
    cluster.ray.drivers = [137, 0, 0]
    assert cluster.end(cluster.night()) == "Complete"


def test_no_attempt_begins_shortly_before_the_deadline(cluster: Cluster) -> None:
    job = cluster.night()
    cluster.wait_for(lambda: cluster.ray.submitted)
    cluster.store.pass_time(39600 - 300)
    cluster.ray.drivers = [137]
    assert cluster.end(job) == "Failed"
    assert len(cluster.ray.submitted) == 1


def more_calls(cluster: Cluster) -> Callable[[], bool]:
    """Return a function: whether the launcher has sent more than three requests since now."""
    calls = len(cluster.api.calls)
    return lambda: len(cluster.api.calls) > calls + 3


def test_an_evicted_launcher_does_not_restart_the_run(cluster: Cluster) -> None:
    job = cluster.night()
    cluster.wait_for(lambda: cluster.ray.submitted)
    for _ in range(2):
        cluster.wait_for(lambda: job["metadata"]["name"] in cluster.jobs.processes)
        cluster.wait_for(more_calls(cluster))
        cluster.jobs.evict(job["metadata"]["name"])
        cluster.step()
    cluster.ray.drivers = [0]
    assert cluster.end(job) == "Complete"
    assert len(cluster.ray.submitted) == 1
    assert not job["status"].get("failed")


def test_a_manual_run_and_the_night_wait_for_each_other(cluster: Cluster) -> None:
    """A run by `kubectl create job --from=cronjob/nightly nightly-now` is not covered by `Forbid`."""
    (cron,) = cluster.store.list("cronjobs")
    manual = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "nightly-now", "ownerReferences": owner(cron)[:0]},
        "spec": cron["spec"]["jobTemplate"]["spec"],
    }
    made = cluster.store.create(manual)
    cluster.wait_for(lambda: cluster.ray.submitted)
    cluster.store.pass_time(3600)  # one o'clock
    cluster.wait_for(lambda: len(cluster.jobs.processes) == 2)
    calls = len(cluster.api.calls)
    cluster.wait_for(lambda: sum("labelSelector" in path for _, path, _ in cluster.api.calls[calls:]) > 2)
    assert len(cluster.ray.submitted) == 1
    cluster.ray.drivers = [0, 0]
    assert cluster.end(made) == "Complete"
    (night,) = [job for job in cluster.store.list("jobs") if job["metadata"]["name"] in cluster.cron_jobs()]
    assert cluster.end(night) == "Complete"
    assert len(cluster.ray.submitted) == 2
    assert any("waiting for its end" in printed for printed in cluster.jobs.printed)


def test_a_labelling_run_succeeds(cluster: Cluster) -> None:
    (job,) = (t for t in render(ROOT / "k8s/overlays/labelling-gpu") if t["kind"] == "Job")
    cluster.ray.drivers = [137, 0]
    made = cluster.store.create(job)
    assert cluster.end(made) == "Complete"
    assert len(cluster.ray.submitted) == 2
    cluster.store.delete("jobs", "labelling-run")
    assert not cluster.store.list("rayjobs")


def test_a_late_role_is_waited_for_and_a_missing_definition_is_named(cluster: Cluster) -> None:
    cluster.api.failures = [403, 503]
    cluster.ray.drivers = [0]
    assert cluster.end(cluster.night()) == "Complete"
    assert "403" in cluster.jobs.printed[0]
    cluster.api.removed = {"rayjobs"}
    assert cluster.end(cluster.night()) == "Failed"
    assert "POST" in cluster.jobs.printed[1]
    assert "404" in cluster.jobs.printed[1]


def test_the_launcher_reads_its_token_again(cluster: Cluster) -> None:
    job = cluster.night()
    cluster.wait_for(lambda: cluster.ray.submitted)
    cluster.api.renew_token("launcher")
    cluster.wait_for(more_calls(cluster))
    cluster.ray.drivers = [0]
    assert cluster.end(job) == "Complete"


def test_the_launcher_logs_what_to_change(cluster: Cluster) -> None:
    (template,) = [t for t in cluster.store.list("raycronjobs") if t["metadata"]["name"] == "nightly"]
    template["spec"]["jobTemplate"]["entrypoints"] = "a typo"
    assert cluster.end(cluster.night()) == "Failed"
    assert "entrypoints" in cluster.jobs.printed[0]
    cluster.store.delete("raycronjobs", "nightly")
    assert cluster.end(cluster.night()) == "Failed"
    assert "there is no RayCronJob nightly" in cluster.jobs.printed[1]


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_the_endpoints_nodes_can_be_drained_one_after_another(overlay: str) -> None:
    store, disruption = apply_to_store(overlay)
    (service,) = store.list("rayservices")
    spec = service["spec"]["rayClusterConfig"]
    made = store.create(
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": {"name": "endpoint-x", "ownerReferences": owner(service)},
            "spec": spec,
        }
    )
    first, second, *_ = make_pods(store, made, spec)
    assert disruption.evict(first) == 201
    assert disruption.evict(second) == 429  # until a pod has replaced the first
    store.create({**store.objects["pods", second], "metadata": _renamed(store, second)})
    assert disruption.evict(second) == 201


def _renamed(store: Store, pod: str) -> dict[str, Any]:
    meta = store.objects["pods", pod]["metadata"]
    return {"name": "successor", "labels": meta["labels"], "ownerReferences": meta["ownerReferences"]}


def test_any_other_kind_of_budget_blocks_every_eviction() -> None:
    """Why the manifests have a number of pods as `minAvailable`."""
    store, disruption = apply_to_store("cpu")
    (budget,) = store.list("poddisruptionbudgets")
    (service,) = store.list("rayservices")
    spec = service["spec"]["rayClusterConfig"]
    cluster_object: KubeObject = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "endpoint-x"},
        "spec": spec,
    }
    pod, *_ = make_pods(store, store.create(cluster_object), spec)
    for limits in ({"maxUnavailable": 1}, {"minAvailable": "50%"}):
        budget["spec"] = {"selector": budget["spec"]["selector"], **limits}
        assert disruption.evict(pod) == 429
        assert "scale subresource" in budget["status"]["conditions"][0]["message"]
