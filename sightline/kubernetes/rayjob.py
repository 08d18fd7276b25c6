"""A run on Kubernetes: RayJobs made from a template in the cluster, and watched to the run's end.

The nightly CronJob's pods and a labelling run's pod do this. A CronJob that only created a RayJob would be done in a
second, and its `concurrencyPolicy: Forbid` would forbid nothing: this process lives as long as the run does.

It also decides what KubeRay cannot. KubeRay tries a RayJob again whatever its driver ended with, and each try starts
`activeDeadlineSeconds` anew (v1.7.0, `checkBackoffLimitAndUpdateStatusIfNeeded` and `initRayJobStatusIfNeed`). So the
template's RayJob has no retries of its own: a try is a RayJob, named for the Job and the number of the try, and gets
what is left of the run's time. What an exit code says that another try cannot mend is not tried again.

It holds no state: a pod that takes the place of an evicted one finds the tries by their names and goes on watching. The
clock is the API server's. Knows the Kubernetes API only by the four calls that it needs. Does not know what a run does.
"""

from __future__ import annotations

import os
import re
import signal
import ssl
import sys
import time
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import httpx2
import typer

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
RAY = "ray.io/v1"
BATCH = "batch/v1"
TEMPLATE_LABEL = "sightline/template"
"""On every RayJob that is made here: the template that it is made from."""
NAME_LENGTH = 47
"""KubeRay's limit on a RayJob's name."""
TRIES = 3
WORTHWHILE_SECONDS = 600
"""A try with less time than this left would do little but bring up a cluster."""
PATIENCE_SECONDS = 600.0
"""How long the API server may be away or refuse. An upgrade of a control plane takes minutes; the RayJob goes on."""
FINAL_CODES = {2: "a setting or a credential is wrong", 3: "too many images were rejected"}
"""What the driver ends with when another try would end the same way."""
SUCCEEDED, FAILED, USAGE, TERMINATED = 0, 1, 2, 143


class Refused(Exception):
    """The API server will not do what was asked. One line that says what to change."""


class KubernetesApi:
    """Reads and makes objects in one namespace, as the pod's service account."""

    def __init__(self, server: str, namespace: str, account: Path = ACCOUNT) -> None:
        self._account = account
        self._namespace = namespace
        context = ssl.create_default_context(cafile=str(account / "ca.crt"))
        self._client = httpx2.Client(base_url=server, verify=context, timeout=30)
        self.now = 0.0
        """Seconds since the epoch at the API server, as of its last answer: no node's clock matters."""

    def get(self, version: str, kind: str, name: str) -> dict[str, Any] | None:
        """The object, or None when there is none. Raises `Refused`."""
        return self._request("GET", f"{self._path(version, kind)}/{name}")

    def labelled(self, version: str, kind: str, label: str, value: str) -> list[dict[str, Any]]:
        """The objects with this label. Raises `Refused`."""
        found = self._request("GET", f"{self._path(version, kind)}?labelSelector={label}%3D{value}")
        return list((found or {}).get("items", []))

    def create(self, version: str, kind: str, body: dict[str, Any]) -> bool:
        """Whether the object is new: False when one of this name is there already. Raises `Refused`."""
        return self._request("POST", self._path(version, kind), body) is not None

    def _path(self, version: str, kind: str) -> str:
        return f"/apis/{version}/namespaces/{self._namespace}/{kind}"

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """One call, tried again while the server is away, busy, or refuses the account.

        A 403 passes: roles are read from a cache that may be behind, and are replaced while an overlay is applied.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        pause = 1.0
        while True:
            # The kubelet renews the token's file every hour or so.
            token = (self._account / "token").read_text().strip()
            try:
                response = self._client.request(
                    method, path, json=body, headers={"Authorization": f"Bearer {token}"} if token else {}
                )
            except httpx2.TransportError as error:
                problem = str(error) or type(error).__name__
            else:
                if date := response.headers.get("Date"):
                    self.now = parsedate_to_datetime(date).timestamp()
                if response.is_success:
                    found: dict[str, Any] = response.json()
                    return found
                if (method, response.status_code) in (("GET", 404), ("POST", 409)):
                    return None
                problem = f"{response.status_code}: {_message(response)}"
                if response.status_code < 500 and response.status_code not in (401, 403, 408, 429):
                    raise Refused(f"{method} {path}: {problem}")
            if time.monotonic() > deadline:
                raise Refused(f"{method} {path}: refused for {PATIENCE_SECONDS:.0f} s ({problem})")
            if pause == 1.0:
                _say(f"{method} {path}: {problem}; trying again for {PATIENCE_SECONDS:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 30)


class Run:
    """The tries of one Job."""

    def __init__(self, api: KubernetesApi, template: str, job: str, uid: str, poll_seconds: float) -> None:
        self._api = api
        self._template, self._job, self._uid = template, job, uid
        self._poll_seconds = poll_seconds

    def execute(self, pause_seconds: float) -> int:
        """Try until it succeeds, cannot, or its time is over. Returns the exit code. Raises `Refused`."""
        found = self._api.get(RAY, "raycronjobs", self._template)
        if found is None:
            raise Refused(f"there is no RayCronJob {self._template}: apply an overlay of k8s/ again")
        spec = found["spec"]["jobTemplate"]
        job = self._api.get(BATCH, "jobs", self._job)
        if job is None:
            raise Refused(f"there is no Job {self._job}")
        ends = _seconds(job["metadata"]["creationTimestamp"]) + spec["activeDeadlineSeconds"]
        if self._api.get(RAY, "rayjobs", self._name(1)) is None:
            self._wait_for_others()
        for number in range(1, TRIES + 1):
            if number > 1:
                time.sleep(pause_seconds)
            name = self._name(number)
            if self._api.get(RAY, "rayjobs", name):
                _say(f"RayJob {name}: under way already")
            else:
                left = int(ends - self._api.now)
                if left < WORTHWHILE_SECONDS:
                    _say(f"{max(left, 0)} s are left of this run: the next one goes on from what is committed")
                    return FAILED
                self._create(name, {**spec, "activeDeadlineSeconds": left})
            status = self._watch(name)
            if status is None:
                return FAILED
            if (status.get("jobDeploymentStatus"), status.get("jobStatus")) == ("Complete", "SUCCEEDED"):
                return SUCCEEDED
            if why := _final(status):
                _say(f"RayJob {name}: not tried again, {why}")
                return FAILED
        return FAILED

    def _name(self, number: int) -> str:
        """KubeRay gives a RayJob's submitter Job the RayJob's name, which must not be that of the launcher's Job."""
        base, end = self._job, f"-{number}"
        if len(base) + len(end) > NAME_LENGTH or not re.fullmatch("[a-z][-a-z0-9]*", base):
            base = f"{self._template}-{self._uid[:8]}"
        return base + end

    def _wait_for_others(self) -> None:
        """Wait until no other Job's run of this template is under way.

        Forbid keeps a CronJob's own Jobs apart. It does not know of those that people make of it by hand.
        """
        last = ""
        while True:
            others = [
                other["metadata"]["name"]
                for other in self._api.labelled(RAY, "rayjobs", TEMPLATE_LABEL, self._template)
                if not _ended(other.get("status", {}))
                and self._uid not in [owner["uid"] for owner in other["metadata"].get("ownerReferences", [])]
            ]
            if not others:
                return
            if others[0] != last:
                _say(f"RayJob {others[0]} of the same template is under way: waiting for its end")
                last = others[0]
            time.sleep(self._poll_seconds)

    def _create(self, name: str, spec: dict[str, Any]) -> None:
        """Make a try. The Job owns it, so that it goes, and its cluster with it, when the Job is deleted."""
        owner = {"apiVersion": BATCH, "kind": "Job", "name": self._job, "uid": self._uid, "controller": True}
        body = {
            "apiVersion": RAY,
            "kind": "RayJob",
            "metadata": {
                "name": name,
                "labels": {
                    "app.kubernetes.io/part-of": "sightline",
                    "app.kubernetes.io/component": "batch",
                    TEMPLATE_LABEL: self._template,
                },
                "ownerReferences": [owner],
            },
            "spec": spec,
        }
        made = self._api.create(RAY, "rayjobs", body)
        _say(f"RayJob {name}: {'created' if made else 'under way already'}, {spec['activeDeadlineSeconds']} s left")

    def _watch(self, name: str) -> dict[str, Any] | None:
        """Follow a try. Returns its last status, or None when it was deleted before its end."""
        last = ""
        while True:
            found = self._api.get(RAY, "rayjobs", name)
            if found is None:
                _say(f"RayJob {name}: deleted before its end")
                return None
            status: dict[str, Any] = found.get("status", {})
            now = " ".join(filter(None, map(status.get, ("jobDeploymentStatus", "jobStatus", "reason", "message"))))
            if now and now != last:
                _say(f"RayJob {name}: {now}")
                last = now
            if _ended(status):
                return status
            time.sleep(self._poll_seconds)


def _ended(status: dict[str, Any]) -> bool:
    return status.get("jobDeploymentStatus") in ("Complete", "Failed", "ValidationFailed")


def _final(status: dict[str, Any]) -> str | None:
    """Why a try that did not succeed is the last one, or None when another may go on from what is committed."""
    if status.get("jobStatus") == "STOPPED":
        return "somebody stopped it"
    if status.get("jobDeploymentStatus") == "ValidationFailed":
        return "the operator refuses its settings"
    if status.get("reason") == "DeadlineExceeded":
        return "its time is over"
    # What Ray's job supervisor writes. The driver's log follows it, in which the same words may stand.
    said = re.match(r"Job entrypoint command failed with exit code (-?\d+)", status.get("message", ""))
    return FINAL_CODES.get(int(said[1])) if said else None


def main(
    template: Annotated[str, typer.Argument(help="A suspended RayCronJob whose jobTemplate is the RayJob.")],
    job: Annotated[str, typer.Option(envvar="JOB_NAME", help="The Job that this pod belongs to: gives the names.")],
    uid: Annotated[str, typer.Option(envvar="JOB_UID", help="That Job's uid: it owns the RayJobs.")],
    namespace: Annotated[str, typer.Option(envvar="NAMESPACE", help="Where all of them are.")],
    poll_seconds: Annotated[float, typer.Option(help="How often to look.")] = 10,
    pause_seconds: Annotated[float, typer.Option(help="How long to wait before another try.")] = 300,
    account: Annotated[Path, typer.Option(help="The service account's folder: ca.crt and token.")] = ACCOUNT,
) -> None:
    """Make a RayJob, wait for its end, and try again what can be mended by that.

    Exit codes: 0 it succeeded; 1 it failed; 2 it could not be made or watched; 143 terminated, the RayJob goes on.
    """
    signal.signal(signal.SIGTERM, _terminate)
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        _fail("not in a pod: KUBERNETES_SERVICE_HOST is not set")
    try:
        api = KubernetesApi(f"https://{f'[{host}]' if ':' in host else host}:{port}", namespace, account)
        code = Run(api, template, job, uid, poll_seconds).execute(pause_seconds)
    except (Refused, OSError) as error:
        _fail(str(error))
    raise typer.Exit(code)


def _seconds(timestamp: str) -> float:
    """Kubernetes' timestamps (RFC 3339, UTC) as seconds since the epoch."""
    return datetime.fromisoformat(timestamp).timestamp()


def _message(response: httpx2.Response) -> str:
    """What the API server says of an error: a Status object's message, or the body's beginning."""
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _say(line: str) -> None:
    print(line, flush=True)


def _fail(message: str) -> NoReturn:
    print(f"sightline.kubernetes.rayjob: {message}", file=sys.stderr, flush=True)
    raise typer.Exit(USAGE)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    _say("terminated: the RayJob goes on, and the next pod of this Job watches it")
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    typer.run(main)
