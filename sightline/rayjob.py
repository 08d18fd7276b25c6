"""Tonight's RayJob: made from a template in the cluster, and watched to its end. What the nightly CronJob's pod runs.

A CronJob that only created a RayJob would be done in a second, and its `concurrencyPolicy: Forbid` would forbid
nothing. This process lives as long as the RayJob does. It holds no state: a pod that takes the place of an evicted one
finds the RayJob by its name, which is its Job's, and goes on watching.

Knows the Kubernetes API only by the three calls that it needs. Does not know what the RayJob does.
"""

from __future__ import annotations

import os
import signal
import ssl
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import httpx2
import typer

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
API = "/apis/ray.io/v1/namespaces/{namespace}/{kind}"
NAME_LENGTH = 47
"""KubeRay's limit on a RayJob's name."""
PATIENCE_SECONDS = 600.0
"""How long the API server may be away. An upgrade of a control plane takes minutes; the RayJob goes on meanwhile."""
SUCCEEDED, FAILED, USAGE, TERMINATED = 0, 1, 2, 143


class Refused(Exception):
    """The API server will never do what was asked. One line that says what to change."""


class KubernetesApi:
    """Reads and makes Ray's resources in one namespace, as the pod's service account."""

    def __init__(self, server: str, namespace: str, account: Path = ACCOUNT) -> None:
        self._account = account
        self._path = API.replace("{namespace}", namespace)
        context = ssl.create_default_context(cafile=str(account / "ca.crt"))
        self._client = httpx2.Client(base_url=server, verify=context, timeout=30)

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """The object, or None when there is none."""
        return self._request("GET", f"{self._path.format(kind=kind)}/{name}")

    def create(self, kind: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The new object, or None when one of this name is there already."""
        return self._request("POST", self._path.format(kind=kind), body)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """One call, tried again while the server is away or busy. Raises `Refused`."""
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
                if response.is_success:
                    found: dict[str, Any] = response.json()
                    return found
                if response.status_code in (404, 409):
                    return None
                problem = f"{response.status_code}: {_message(response)}"
                if response.status_code < 500 and response.status_code not in (401, 408, 429):
                    raise Refused(f"{method} {path}: {problem}")
            if time.monotonic() > deadline:
                raise Refused(f"{method} {path}: no answer for {PATIENCE_SECONDS:.0f} s ({problem})")
            time.sleep(pause)
            pause = min(2 * pause, 30)


def launch(api: KubernetesApi, template: str, job: str, uid: str) -> str:
    """Make the RayJob that `template`, a RayCronJob, describes, unless it is there. Returns its name.

    It is owned by the Job, so that it goes when the CronJob's history drops the Job. Raises `Refused`.
    """
    found = api.get("raycronjobs", template)
    if found is None:
        raise Refused(f"there is no RayCronJob {template}: apply an overlay of k8s/ again")
    name = job if len(job) <= NAME_LENGTH and job[0].isalpha() and "." not in job else f"{template}-{uid[:8]}"
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": uid, "controller": True}
    body = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/part-of": "sightline", "app.kubernetes.io/component": "batch"},
            "ownerReferences": [owner],
        },
        "spec": found["spec"]["jobTemplate"],
    }
    _say(f"RayJob {name}: {'created' if api.create('rayjobs', body) else 'under way already'}")
    return name


def watch(api: KubernetesApi, name: str, poll_seconds: float) -> int:
    """Follow a RayJob to its end. Returns the exit code. Raises `Refused`."""
    last = ""
    while True:
        found = api.get("rayjobs", name)
        if found is None:
            _say(f"RayJob {name}: deleted before its end")
            return FAILED
        status = found.get("status", {})
        deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
        now = " ".join(filter(None, (deployment, job, status.get("reason"), status.get("message"))))
        if now and now != last:
            _say(f"RayJob {name}: {now}")
            last = now
        if deployment == "Complete":
            return SUCCEEDED if job == "SUCCEEDED" else FAILED
        if deployment in ("Failed", "ValidationFailed"):
            return FAILED
        time.sleep(poll_seconds)


def main(
    template: Annotated[str, typer.Argument(help="A RayCronJob, suspended or not, whose jobTemplate is the RayJob.")],
    job: Annotated[str, typer.Option(envvar="JOB_NAME", help="The Job that this pod belongs to: gives the name.")],
    uid: Annotated[str, typer.Option(envvar="JOB_UID", help="That Job's uid: it owns the RayJob.")],
    namespace: Annotated[str, typer.Option(envvar="NAMESPACE", help="Where all of them are.")],
    poll_seconds: Annotated[float, typer.Option(help="How often to look.")] = 10,
    account: Annotated[Path, typer.Option(help="The service account's folder: ca.crt and token.")] = ACCOUNT,
) -> None:
    """Make a RayJob and wait for its end.

    Exit codes: 0 it succeeded; 1 it failed; 2 it could not be made or watched; 143 terminated, the RayJob goes on.
    """
    signal.signal(signal.SIGTERM, _terminate)
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        _fail("not in a pod: KUBERNETES_SERVICE_HOST is not set")
    try:
        api = KubernetesApi(f"https://{f'[{host}]' if ':' in host else host}:{port}", namespace, account)
        code = watch(api, launch(api, template, job, uid), poll_seconds)
    except (Refused, OSError) as error:
        _fail(str(error))
    raise typer.Exit(code)


def _message(response: httpx2.Response) -> str:
    """What the API server says of an error: a Status object's message, or the body's beginning."""
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _say(line: str) -> None:
    print(line, flush=True)


def _fail(message: str) -> NoReturn:
    print(f"sightline.rayjob: {message}", file=sys.stderr, flush=True)
    raise typer.Exit(USAGE)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    _say("terminated: the RayJob goes on, and the next pod of this Job watches it")
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    typer.run(main)
