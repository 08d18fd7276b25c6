"""Simulated controllers of Kubernetes and KubeRay for the objects of `tests.k8s.support.apiserver`.

Each follows its original in the points listed here, which matter to the manifests, and does nothing else. Pods are
simulated: a launcher's pod is the rendered command as a process, and the test gives the result of Ray's driver.

* CronJob: `syncCronJob` of pkg/controller/cronjob: names, Forbid, starting deadline, history.
* Job: pkg/controller/job: retries, podFailurePolicy, activeDeadlineSeconds.
* RayJob: `Reconcile` of rayjob_controller.go in KubeRay 1.7.0: states, deadlines, retries, submitter Job, deletion.
* Disruption: `getExpectedPodCount` of pkg/controller/disruption, and evictions, which depend on its result.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from typing import Any

from tests.k8s.support.apiserver import NAMESPACE, ApiServer, Conflict, KubeObject, Store, seconds_of, timestamp

OPERATOR = {"app.kubernetes.io/created-by": "kuberay-operator"}


SCALES = {"Deployment", "ReplicaSet", "ReplicationController", "StatefulSet"}
"""Kinds with a `scale` subresource, which tells how many pods they want."""


def owner(obj: KubeObject) -> list[KubeObject]:
    """Return the owner references of an object that `obj` controls."""
    meta = obj["metadata"]
    return [
        {
            "apiVersion": obj["apiVersion"],
            "kind": obj["kind"],
            "name": meta["name"],
            "uid": meta["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]


def condition(obj: KubeObject, kind: str) -> KubeObject | None:
    """Return the condition of this type if it is true, else None."""
    return next((c for c in obj["status"].get("conditions", []) if c["type"] == kind and c["status"] == "True"), None)


class CronJobs:
    """The CronJob controller, for daily schedules `M H * * *` in UTC, as in the manifests."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def step(self) -> None:
        for cron in self.store.list("cronjobs"):
            self.sync(cron)

    def sync(self, cron: KubeObject) -> None:
        spec, status, now = cron["spec"], cron["status"], self.store.now()
        jobs = list(self.store.owned("jobs", cron))
        finished = {kind: [job for job in jobs if condition(job, kind)] for kind in ("Complete", "Failed")}
        for kind, limit in (("Complete", "successfulJobsHistoryLimit"), ("Failed", "failedJobsHistoryLimit")):
            for job in finished[kind][: max(0, len(finished[kind]) - spec[limit])]:
                self.store.delete("jobs", job["metadata"]["name"])
        active = [job for job in jobs if not condition(job, "Complete") and not condition(job, "Failed")]
        status["active"] = [job["metadata"]["name"] for job in active]
        if finished["Complete"]:
            status["lastSuccessfulTime"] = finished["Complete"][-1]["status"]["completionTime"]
        if spec.get("suspend"):
            return
        minute, hour = map(int, spec["schedule"].split()[:2])
        today = datetime.fromtimestamp(now, UTC).replace(hour=hour, minute=minute, second=0, microsecond=0).timestamp()
        due = today if today <= now else today - 86400
        if due <= status.get("last", seconds_of(cron["metadata"]["creationTimestamp"])):
            return
        if due + spec["startingDeadlineSeconds"] < now:
            self.store.record_event("MissSchedule", cron["metadata"]["name"])
            return
        if spec["concurrencyPolicy"] == "Forbid" and active:
            self.store.record_event("JobAlreadyActive", cron["metadata"]["name"])
            return
        name = f"{cron['metadata']['name']}-{int(due // 60)}"
        self.store.create(
            {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": name, "ownerReferences": owner(cron)},
                "spec": spec["jobTemplate"]["spec"],
            }
        )
        status["last"] = due


class Jobs:
    """The Job controller, for Jobs with one pod: a launcher's is a process, and `RayJobs` simulates a submitter's."""

    def __init__(self, store: Store, api: ApiServer) -> None:
        self.store, self.api = store, api
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.printed: list[str] = []
        self.evicted: set[str] = set()

    def step(self) -> None:
        for job in self.store.list("jobs"):
            if not condition(job, "Complete") and not condition(job, "Failed"):
                self.sync(job)

    def sync(self, job: KubeObject) -> None:
        spec, status, name = job["spec"], job["status"], job["metadata"]["name"]
        status.setdefault("startTime", timestamp(self.store.now()))
        limit = spec.get("activeDeadlineSeconds")
        if limit and self.store.now() >= seconds_of(status["startTime"]) + limit:
            self.finish(job, "Failed", "DeadlineExceeded")
            self.end(name)
            return
        if "ray.io/originated-from-cr-name" in job["metadata"].get("labels", {}):
            return  # `RayJobs` simulates its pod
        process = self.processes.get(name)
        if process is None:
            self.start(job)
            return
        code = process.poll()
        if code is None:
            return
        assert process.stdout
        self.printed.append(process.stdout.read())
        process.stdout.close()
        del self.processes[name]
        if code == 0:
            self.finish(job, "Complete", "CompletionsReached")
            return
        for rule in spec.get("podFailurePolicy", {}).get("rules", []):
            disrupted = name in self.evicted and any(
                c["type"] == "DisruptionTarget" for c in rule.get("onPodConditions", [])
            )
            codes = rule.get("onExitCodes", {})
            if disrupted or code in codes.get("values", []):
                self.evicted.discard(name)
                if rule["action"] == "FailJob":
                    self.finish(job, "Failed", "PodFailurePolicy")
                    return
                assert rule["action"] == "Ignore"
                return  # another pod is created, and no failure is counted
        status["failed"] = status.get("failed", 0) + 1
        if status["failed"] > spec["backoffLimit"]:
            self.finish(job, "Failed", "BackoffLimitExceeded")

    def start(self, job: KubeObject) -> None:
        """Start the pod as a kubelet does: the rendered command, with variables from the pod's fields."""
        template = job["spec"]["template"]["spec"]
        (container,) = template["containers"]
        labels = {
            "batch.kubernetes.io/job-name": job["metadata"]["name"],
            "batch.kubernetes.io/controller-uid": job["metadata"]["uid"],
        }
        env = dict(os.environ)
        for entry in container["env"]:
            path = entry["valueFrom"]["fieldRef"]["fieldPath"]
            env[entry["name"]] = NAMESPACE if path == "metadata.namespace" else labels[path.split("'")[1]]
        env |= {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.api.port)}
        self.api.renew_token(template["serviceAccountName"])
        command = [sys.executable, *container["command"][1:], "--account", str(self.api.folder)]
        command += ["--poll-seconds", "0.05", "--pause-seconds", "0.1"]
        self.processes[job["metadata"]["name"]] = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, job: KubeObject, kind: str, reason: str) -> None:
        at = timestamp(self.store.now())
        job["status"].setdefault("conditions", []).append({"type": kind, "status": "True", "reason": reason})
        job["status"]["finishedAt"] = at
        if kind == "Complete":
            job["status"]["completionTime"] = at

    def evict(self, name: str) -> None:
        """Drain the node of the Job's pod: send SIGTERM, and set the condition DisruptionTarget."""
        self.evicted.add(name)
        self.processes[name].terminate()
        self.processes[name].wait(30)

    def end(self, name: str) -> None:
        """Stop the Job's process, if there is one."""
        if process := self.processes.pop(name, None):
            process.terminate()
            self.printed.append(process.communicate(timeout=30)[0])

    def close(self) -> None:
        for name in list(self.processes):
            self.end(name)


class RayJobs:
    """KubeRay's operator, and Ray. `drivers` has the end of each submitted driver, or None while the driver runs."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.drivers: list[int | str | None] = []
        self.submitted: list[str] = []
        """The names of the RayJobs whose drivers started."""

    def step(self) -> None:
        for job in self.store.list("rayjobs"):
            self.sync(job)

    def sync(self, job: KubeObject) -> None:
        spec, status, name, now = job["spec"], job["status"], job["metadata"]["name"], self.store.now()
        state = status.get("jobDeploymentStatus", "")
        if state in ("", "New"):
            if len(name) > 47:
                status |= {"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed"}
                return
            # Each attempt starts here, and its deadline with it.
            status |= {
                "jobDeploymentStatus": "Initializing",
                "jobStatus": "",
                "jobId": f"{name}-{uuid.uuid4().hex[:5]}",
                "rayClusterName": f"{name}-{uuid.uuid4().hex[:5]}",
                "startTime": timestamp(now),
            }
        elif state in ("Initializing", "Running"):
            if spec.get("suspend"):
                status["jobDeploymentStatus"] = "Suspending"
            elif now >= seconds_of(status["startTime"]) + spec.get("activeDeadlineSeconds", 1e9):
                self.fail(job, "DeadlineExceeded", "The RayJob has passed the activeDeadlineSeconds.")
            elif state == "Initializing":
                self.initialize(job)
            else:
                self.run(job)
        elif state in ("Retrying", "Suspending"):
            self.store.delete("rayclusters", status["rayClusterName"])
            self.store.delete("jobs", name)
            kept = {"failed": status.get("failed", 0)}
            status.clear()
            status |= {**kept, "jobDeploymentStatus": "New" if state == "Retrying" else "Suspended"}
        elif state == "Suspended" and not spec.get("suspend"):
            status["jobDeploymentStatus"] = "New"
        elif state in ("Complete", "Failed"):
            self.clean(job)

    def initialize(self, job: KubeObject) -> None:
        name, status = job["metadata"]["name"], job["status"]
        if not self.store.get("rayclusters", status["rayClusterName"]):
            self.store.create(
                {
                    "apiVersion": "ray.io/v1",
                    "kind": "RayCluster",
                    "metadata": {"name": status["rayClusterName"], "ownerReferences": owner(job)},
                    "spec": job["spec"]["rayClusterSpec"],
                }
            )
            return
        # The operator's cache holds only Jobs with its own labels. It does not find another Job of the same name, and
        # then cannot create its own.
        if not [found for found in self.store.list("jobs", **OPERATOR) if found["metadata"]["name"] == name]:
            labels = {
                "ray.io/originated-from-cr-name": name,
                "ray.io/originated-from-crd": "RayJob",
                **OPERATOR,
            }
            backoff = job["spec"].get("submitterConfig", {}).get("backoffLimit", 2)
            submitter: KubeObject = {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": name, "labels": labels, "ownerReferences": owner(job)},
                "spec": {"backoffLimit": backoff, "template": job["spec"]["submitterPodTemplate"]},
            }
            try:
                self.store.create(submitter)
            except Conflict as conflict:
                self.store.record_event("FailedToCreateRayJobSubmitter", str(conflict))
                return
        self.submitted.append(name)
        status["jobDeploymentStatus"] = "Running"

    def run(self, job: KubeObject) -> None:
        status = job["status"]
        ended = self.drivers[len(self.submitted) - 1] if len(self.submitted) <= len(self.drivers) else None
        if ended is None:
            status["jobStatus"] = "RUNNING"
            return
        # `ray job logs --follow` exits with 0 however the driver ended, so the submitter is complete.
        if ended == 0:
            status |= {
                "jobStatus": "SUCCEEDED",
                "jobDeploymentStatus": "Complete",
                "endTime": timestamp(self.store.now()),
            }
        elif ended == "stopped":
            status |= {
                "jobStatus": "STOPPED",
                "jobDeploymentStatus": "Complete",
                "endTime": timestamp(self.store.now()),
            }
        elif isinstance(ended, str):
            self.fail(job, ended, "")
        else:
            status["jobStatus"] = "FAILED"
            words = f"Job entrypoint command failed with exit code {ended}, last available logs (truncated):\nFAILED 2"
            self.fail(job, "AppFailed", words)

    def fail(self, job: KubeObject, reason: str, message: str) -> None:
        status = job["status"]
        status["failed"] = status.get("failed", 0) + 1
        status |= {"reason": reason, "message": message, "endTime": timestamp(self.store.now())}
        final = reason in ("DeadlineExceeded", "JobStatusCheckTimeoutExceeded")
        again = not final and status["failed"] < job["spec"].get("backoffLimit", -1) + 1
        status["jobDeploymentStatus"] = "Retrying" if again else "Failed"

    def clean(self, job: KubeObject) -> None:
        spec, status, name = job["spec"], job["status"], job["metadata"]["name"]
        passed = self.store.now() - seconds_of(status["endTime"])
        policies = [
            rule["policy"]
            for rule in spec.get("deletionStrategy", {}).get("deletionRules", [])
            if passed >= rule["condition"].get("ttlSeconds", 0)
            and rule["condition"].get("jobStatus", status["jobStatus"]) == status["jobStatus"]
            and rule["condition"].get("jobDeploymentStatus", status["jobDeploymentStatus"])
            == status["jobDeploymentStatus"]
        ]
        if "DeleteSelf" in policies:
            self.store.delete("rayjobs", name)
        elif "DeleteCluster" in policies or (
            spec.get("shutdownAfterJobFinishes") and passed >= spec.get("ttlSecondsAfterFinished", 0)
        ):
            self.store.delete("rayclusters", status["rayClusterName"])


class Disruption:
    """The disruption controller, and evictions."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def step(self) -> None:
        for budget in self.store.list("poddisruptionbudgets"):
            budget["status"] = self.status_of(budget["spec"])

    def status_of(self, spec: KubeObject) -> KubeObject:
        pods = self.store.list("pods", **spec["selector"]["matchLabels"])
        healthy = sum(pod["status"].get("ready", False) for pod in pods)
        wanted = spec.get("minAvailable")
        if not isinstance(wanted, int):
            for pod in pods:
                (reference,) = pod["metadata"]["ownerReferences"]
                if reference["kind"] not in SCALES:
                    problem = f"{reference['kind'].lower()}s.ray.io does not implement the scale subresource"
                    failed = {
                        "type": "DisruptionAllowed",
                        "status": "False",
                        "reason": "SyncFailed",
                        "message": problem,
                    }
                    return {"disruptionsAllowed": 0, "conditions": [failed]}
            raise NotImplementedError("pods with a scale")
        return {"disruptionsAllowed": max(0, healthy - wanted), "conditions": []}

    def evict(self, pod: str) -> int:
        """Return the status code of POST .../eviction."""
        self.step()
        labels = (self.store.objects["pods", pod])["metadata"]["labels"]
        for budget in self.store.list("poddisruptionbudgets"):
            if budget["spec"]["selector"]["matchLabels"].items() <= labels.items():
                if not budget["status"]["disruptionsAllowed"]:
                    return 429
                budget["status"]["disruptionsAllowed"] -= 1
        self.store.delete("pods", pod)
        return 201


def make_pods(store: Store, cluster: KubeObject, spec: dict[str, Any]) -> list[str]:
    """Create the ready worker pods of a Ray cluster of minimum size, as the operator does. Returns their names."""
    names = []
    for group in spec["workerGroupSpecs"]:
        for number in range(group["minReplicas"]):
            template = group["template"]
            name = f"{cluster['metadata']['name']}-{group['groupName']}-{number}"
            labels = {**template["metadata"]["labels"], "ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"}
            pod: KubeObject = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "labels": labels, "ownerReferences": owner(cluster)},
                "spec": template["spec"],
                "status": {"ready": True},
            }
            store.create(pod)
            names.append(name)
    return names
