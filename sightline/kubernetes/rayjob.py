"""Launcher of a batch run on Kubernetes: makes RayJobs from a template, and watches them until the run ends.

The pods of the nightly CronJob and the pod of a labelling run execute this. If a CronJob's pod only created a RayJob,
it would end within a second, and the CronJob's `concurrencyPolicy: Forbid` would have no effect. This process runs as
long as the run does.

It also decides when to try again, which KubeRay cannot do: KubeRay retries a RayJob whatever exit code its driver ended
with, and each retry starts `activeDeadlineSeconds` anew (v1.7.0, `checkBackoffLimitAndUpdateStatusIfNeeded` and
`initRayJobStatusIfNeed`). So the template's RayJob has no retries of its own. Each try is a RayJob, named after the Job
and the number of the try, and its deadline is the time that is left of the run. There is no other try after an exit
code that would come again.

The process holds no state: a pod that replaces an evicted one finds the tries by their names, and goes on watching.
All times are those of the API server's clock. It uses four calls of the Kubernetes API, and knows nothing of what a run
does.
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
"""The label of each RayJob that is made here. Its value is the name of the template."""
NAME_LENGTH = 47
"""The longest name that KubeRay accepts for a RayJob."""
TRIES = 3
"""The most RayJobs for one run."""
WORTHWHILE_SECONDS = 600
"""No try is made with less time left than this: it would do little more than start a cluster."""
PATIENCE_SECONDS = 600.0
"""How long the API server may be unreachable or refuse requests. Upgrading a control plane takes minutes, during which
the RayJob goes on."""
FINAL_CODES = {2: "a setting or a credential is wrong", 3: "too many images were rejected"}
"""Exit codes of the driver after which another try would end in the same way, with the reason."""
SUCCEEDED, FAILED, USAGE, TERMINATED = 0, 1, 2, 143


class Refused(Exception):
    """The API server refuses a request. The message is one line that says what to change."""


class KubernetesApi:
    """Reads and creates objects in one namespace, with the pod's service account."""

    def __init__(self, server: str, namespace: str, account: Path = ACCOUNT) -> None:
        self._account = account
        self._namespace = namespace
        context = ssl.create_default_context(cafile=str(account / "ca.crt"))
        self._client = httpx2.Client(base_url=server, verify=context, timeout=30)
        self.now = 0.0
        """The API server's clock at its last response, in seconds since the epoch. No node's clock is used."""

    def get(self, version: str, kind: str, name: str) -> dict[str, Any] | None:
        """Return an object, or None if it does not exist. Raises `Refused`."""
        return self._request("GET", f"{self._path(version, kind)}/{name}")

    def labelled(self, version: str, kind: str, label: str, value: str) -> list[dict[str, Any]]:
        """Return the objects with a label of this value. Raises `Refused`."""
        found = self._request("GET", f"{self._path(version, kind)}?labelSelector={label}%3D{value}")
        return list((found or {}).get("items", []))

    def create(self, version: str, kind: str, body: dict[str, Any]) -> bool:
        """Create an object. Returns False if an object of this name already exists. Raises `Refused`."""
        return self._request("POST", self._path(version, kind), body) is not None

    def _path(self, version: str, kind: str) -> str:
        return f"/apis/{version}/namespaces/{self._namespace}/{kind}"

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Send a request, again and again while the server is unreachable, busy, or refuses the account.

        Returns None for a GET of an object that does not exist (404), and for a POST of a name that exists (409). A 403
        is tried again because it may be temporary: the server reads roles from a cache that may be out of date, and
        roles are replaced while an overlay is applied. Raises `Refused` for other errors, and after
        `PATIENCE_SECONDS`.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        pause = 1.0
        while True:
            # Read each time: the kubelet renews the token's file about every hour.
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
                _log(f"{method} {path}: {problem}; trying again for {PATIENCE_SECONDS:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 30)


class Run:
    """The run of one Job: its tries, one after the other."""

    def __init__(self, api: KubernetesApi, template: str, job: str, uid: str, poll_seconds: float) -> None:
        self._api = api
        self._template, self._job, self._uid = template, job, uid
        self._poll_seconds = poll_seconds

    def execute(self, pause_seconds: float) -> int:
        """Try until a try succeeds, none can succeed, or the time is over. Returns the exit code. Raises `Refused`."""
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
                _log(f"RayJob {name}: under way already")
            else:
                left = int(ends - self._api.now)
                if left < WORTHWHILE_SECONDS:
                    _log(f"{max(left, 0)} s are left of this run: the next run goes on from what is committed")
                    return FAILED
                self._create(name, {**spec, "activeDeadlineSeconds": left})
            status = self._watch(name)
            if status is None:
                return FAILED
            if (status.get("jobDeploymentStatus"), status.get("jobStatus")) == ("Complete", "SUCCEEDED"):
                return SUCCEEDED
            if why := _final(status):
                _log(f"RayJob {name}: not tried again, {why}")
                return FAILED
        return FAILED

    def _name(self, number: int) -> str:
        """Return the name of a try's RayJob.

        It differs from the launcher's Job, because KubeRay's submitter Job gets the RayJob's name. It is made of the
        Job's name, or of the template's name and the Job's uid if the Job's name is too long or starts with a digit.
        """
        base, end = self._job, f"-{number}"
        if len(base) + len(end) > NAME_LENGTH or not re.fullmatch("[a-z][-a-z0-9]*", base):
            base = f"{self._template}-{self._uid[:8]}"
        return base + end

    def _wait_for_others(self) -> None:
        """Wait until no other Job's run of this template is under way.

        `concurrencyPolicy: Forbid` only keeps a CronJob's own Jobs apart, not the Jobs that people create from it.
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
                _log(f"RayJob {others[0]} of the same template is under way: waiting for its end")
                last = others[0]
            time.sleep(self._poll_seconds)

    def _create(self, name: str, spec: dict[str, Any]) -> None:
        """Create a try. The Job owns it, so Kubernetes deletes it and its cluster when the Job is deleted."""
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
        _log(f"RayJob {name}: {'created' if made else 'under way already'}, {spec['activeDeadlineSeconds']} s left")

    def _watch(self, name: str) -> dict[str, Any] | None:
        """Print a try's changes until it ends. Returns its last status, or None if it was deleted before its end."""
        last = ""
        while True:
            found = self._api.get(RAY, "rayjobs", name)
            if found is None:
                _log(f"RayJob {name}: deleted before its end")
                return None
            status: dict[str, Any] = found.get("status", {})
            now = " ".join(filter(None, map(status.get, ("jobDeploymentStatus", "jobStatus", "reason", "message"))))
            if now and now != last:
                _log(f"RayJob {name}: {now}")
                last = now
            if _ended(status):
                return status
            time.sleep(self._poll_seconds)


def _ended(status: dict[str, Any]) -> bool:
    return status.get("jobDeploymentStatus") in ("Complete", "Failed", "ValidationFailed")


def _final(status: dict[str, Any]) -> str | None:
    """Return why there is no other try after one that failed, or None if another can go on from what is committed."""
    if status.get("jobStatus") == "STOPPED":
        return "somebody stopped it"
    if status.get("jobDeploymentStatus") == "ValidationFailed":
        return "the operator refuses its settings"
    if status.get("reason") == "DeadlineExceeded":
        return "its time is over"
    # Ray's job supervisor writes this at the start of the message. The driver's log follows, which may hold the same
    # words.
    ended = re.match(r"Job entrypoint command failed with exit code (-?\d+)", status.get("message", ""))
    return FINAL_CODES.get(int(ended[1])) if ended else None


def main(
    template: Annotated[str, typer.Argument(help="A suspended RayCronJob, whose jobTemplate is the RayJob to make.")],
    job: Annotated[str, typer.Option(envvar="JOB_NAME", help="The Job of this pod; RayJobs are named after it.")],
    uid: Annotated[str, typer.Option(envvar="JOB_UID", help="The Job's uid. The Job owns the RayJobs.")],
    namespace: Annotated[str, typer.Option(envvar="NAMESPACE", help="The namespace of all these objects.")],
    poll_seconds: Annotated[float, typer.Option(help="How often to read a RayJob's status.")] = 10,
    pause_seconds: Annotated[float, typer.Option(help="How long to wait before another try.")] = 300,
    account: Annotated[Path, typer.Option(help="The service account's folder, with ca.crt and token.")] = ACCOUNT,
) -> None:
    """Make a RayJob from a template, wait for its end, and make another if it failed and another can succeed.

    Exit codes: 0 a RayJob succeeded; 1 the run failed; 2 a RayJob could not be made or watched; 143 terminated, the
    RayJob goes on.
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
    """Convert a timestamp of Kubernetes (RFC 3339, UTC) to seconds since the epoch."""
    return datetime.fromisoformat(timestamp).timestamp()


def _message(response: httpx2.Response) -> str:
    """Return the API server's error message: that of its Status object, or else the first 200 characters."""
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _log(line: str) -> None:
    """Print a line at once: the pod's log is what people read."""
    print(line, flush=True)


def _fail(message: str) -> NoReturn:
    print(f"sightline.kubernetes.rayjob: {message}", file=sys.stderr, flush=True)
    raise typer.Exit(USAGE)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    _log("terminated: the RayJob goes on, and the next pod of this Job watches it")
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    typer.run(main)
