"""The nightly launcher against an API server: real HTTPS, a real token, objects checked by KubeRay's schemas."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme
from jsonschema import ValidationError

from tests.kubernetes import ROOT, check, find_kubectl, render

PREFIX = "/apis/ray.io/v1/namespaces/sightline"
TOKEN = "first-token"

pytestmark = pytest.mark.skipif(
    not find_kubectl() and not os.environ.get("SIGHTLINE_CI"), reason="kubectl is not installed"
)


class ApiServer:
    """As much of an API server as stands between the launcher and the operator: it stores, checks and refuses."""

    def __init__(self, folder: Path) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[str, str, int]] = []
        self.failing = 0
        self.token = TOKEN
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        authority.cert_pem.write_to_path(str(folder / "ca.crt"))
        (folder / "token").write_text(TOKEN)
        self.folder = folder
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer("GET")

            def do_POST(self) -> None:
                self.answer("POST")

            def answer(self, method: str) -> None:
                length = int(self.headers.get("Content-Length", 0))
                code, body = api.handle(method, self.path, self.headers["Authorization"], self.rfile.read(length))
                data = json.dumps(body).encode()
                api.calls.append((method, self.path, code))
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def handle(self, method: str, path: str, authorization: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.failing:
            self.failing -= 1
            return 503, {"message": "etcd is away"}
        if authorization != f"Bearer {self.token}":
            return 401, {"message": "Unauthorized"}
        if method == "GET":
            found = self.objects.get(path)
            return (200, found) if found else (404, {"message": "not found"})
        thing = json.loads(body)
        name = f"{path}/{thing['metadata']['name']}"
        if name in self.objects:
            return 409, {"message": "exists"}
        try:
            check(thing)
        except ValidationError as error:
            return 422, {"message": error.message}
        self.objects[name] = thing
        return 201, thing

    def set_status(self, name: str, **status: str) -> None:
        self.objects[f"{PREFIX}/rayjobs/{name}"]["status"] = status

    def launch(self) -> subprocess.Popen[str]:
        """The very command of the CronJob's pod, in an environment like its own."""
        (job,) = (thing for thing in render(ROOT / "k8s/overlays/gpu") if thing["kind"] == "CronJob")
        (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        assert {entry["name"] for entry in container["env"]} == {"JOB_NAME", "JOB_UID", "NAMESPACE"}
        env = {
            **os.environ,
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(self.server.server_address[1]),
            "JOB_NAME": "nightly-29384720",
            "JOB_UID": "2f1c0f6e-0000-4000-8000-000000000000",
            "NAMESPACE": "sightline",
        }
        command = [sys.executable, *container["command"][1:], "--account", str(self.folder), "--poll-seconds", "0.1"]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def until_made(self) -> str:
        """The name of the RayJob, when it is there."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for path in list(self.objects):
                if "/rayjobs/" in path:
                    return path.rpartition("/")[2]
            time.sleep(0.05)
        raise AssertionError(f"no RayJob: {self.calls}")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    """An API server with the overlay's template in it."""
    server = ApiServer(tmp_path)
    (template,) = (thing for thing in render(ROOT / "k8s/overlays/gpu") if thing["kind"] == "RayCronJob")
    server.objects[f"{PREFIX}/raycronjobs/nightly"] = template
    yield server
    server.server.shutdown()
    server.server.server_close()
    server.thread.join()


def test_it_makes_the_rayjob_and_waits_for_its_success(api: ApiServer) -> None:
    api.failing = 1
    pod = api.launch()
    name = api.until_made()
    made = api.objects[f"{PREFIX}/rayjobs/{name}"]
    template = api.objects[f"{PREFIX}/raycronjobs/nightly"]
    assert made["spec"] == template["spec"]["jobTemplate"]
    (owner,) = made["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"][:8]) == ("Job", "nightly-29384720", "2f1c0f6e")
    for status in ("Initializing", "Running"):
        api.set_status(name, jobDeploymentStatus=status, jobStatus="PENDING")
        time.sleep(0.3)
        assert pod.poll() is None
    # The kubelet renews the token, and the old one ends.
    api.token = "second-token"
    (api.folder / "token").write_text(api.token)
    api.set_status(name, jobDeploymentStatus="Retrying", jobStatus="FAILED")
    time.sleep(0.3)
    assert pod.poll() is None
    api.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    said = pod.communicate(timeout=30)[0]
    assert pod.returncode == 0, said
    assert "Running PENDING" in said


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "exit code 3"}, 1),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, 1),
        ({"jobDeploymentStatus": "ValidationFailed"}, 1),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 1),
    ],
)
def test_it_fails_with_the_rayjob(api: ApiServer, status: dict[str, str], code: int) -> None:
    pod = api.launch()
    api.set_status(api.until_made(), **status)
    said = pod.communicate(timeout=30)[0]
    assert pod.returncode == code, said
    assert " ".join(status.values()) in said


def test_the_next_pod_of_a_job_goes_on_watching(api: ApiServer) -> None:
    first = api.launch()
    name = api.until_made()
    time.sleep(0.3)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=30)[0]
    assert first.returncode == 143, said
    second = api.launch()
    time.sleep(1)
    api.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    said = second.communicate(timeout=30)[0]
    assert second.returncode == 0, said
    assert "under way already" in said
    assert sum("/rayjobs/" in path for path in api.objects) == 1


def test_it_says_what_to_change(api: ApiServer) -> None:
    template = api.objects.pop(f"{PREFIX}/raycronjobs/nightly")
    pod = api.launch()
    assert "there is no RayCronJob nightly" in pod.communicate(timeout=30)[0]
    assert pod.returncode == 2
    template["spec"]["jobTemplate"]["entrypoints"] = "a typo"
    api.objects[f"{PREFIX}/raycronjobs/nightly"] = template
    pod = api.launch()
    assert "entrypoints" in pod.communicate(timeout=30)[0]
    assert pod.returncode == 2
