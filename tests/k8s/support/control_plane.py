"""A real Kubernetes control plane with KubeRay's real operator on loopback. Nodes and Ray are simulated.

Three environment variables name the programs; CONTRIBUTING.md says how to get them:

* KUBEBUILDER_ASSETS: the folder of etcd, kube-apiserver and kube-controller-manager
* KUBERAY_OPERATOR: the operator's program
* KUBERAY_CRDS: the folder of its CustomResourceDefinitions and, in `role.yaml`, its ClusterRole

Permissions, admission, validation, garbage collection, Jobs, CronJobs, disruption budgets and KubeRay's operator are
real. Nothing is scheduled, and no container runs except the launcher's: `Nodes` reports every pod as running, and `Ray`
responds to the operator.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx2
import trustme
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.k8s.support.schemas import find_kubectl
from tests.support.ports import free_port

KubeObject = dict[str, Any]
VARIABLES = ("KUBEBUILDER_ASSETS", "KUBERAY_OPERATOR", "KUBERAY_CRDS")
NAMESPACE = "sightline"


def is_installed() -> bool:
    """Whether the environment variables name a control plane."""
    return all(os.environ.get(name) for name in VARIABLES)


def own_address() -> str:
    """Return an address of this machine that is not loopback, because the API server refuses pods on loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("198.51.100.1", 9))  # a UDP socket sends nothing on connect
        return str(probe.getsockname()[0])


class ControlPlane:
    """The four programs, as a context manager. Their state and logs are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "ca.crt"))
        certificate = authority.issue_cert("127.0.0.1", "localhost")
        certificate.private_key_pem.write_to_path(str(folder / "server.key"))
        for blob in certificate.cert_chain_pems:
            blob.write_to_path(str(folder / "server.crt"), append=True)
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        (folder / "accounts.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        users = {"admin": '"system:masters"', "operator": ""}
        self.tokens = {user: uuid.uuid4().hex for user in users}
        lines = [f"{self.tokens[user]},{user},{user},{groups}" for user, groups in users.items()]
        (folder / "tokens.csv").write_text("\n".join(lines) + "\n")
        self.client = httpx2.Client(
            base_url=self.url,
            verify=ssl.create_default_context(cafile=str(folder / "ca.crt")),
            timeout=30,
            headers={"Authorization": f"Bearer {self.tokens['admin']}"},
        )

    def __enter__(self) -> Self:
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_all(self) -> None:
        assets = Path(os.environ["KUBEBUILDER_ASSETS"])
        store, peers = free_port(), free_port()
        self.start(
            "etcd",
            assets / "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls=http://127.0.0.1:{store}",
            f"--advertise-client-urls=http://127.0.0.1:{store}",
            f"--listen-peer-urls=http://127.0.0.1:{peers}",
            "--unsafe-no-fsync",
        )
        self.start(
            "kube-apiserver",
            assets / "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{store}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            f"--advertise-address={own_address()}",
            f"--tls-cert-file={self.folder / 'server.crt'}",
            f"--tls-private-key-file={self.folder / 'server.key'}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            # The cache needs a feature that Debian's etcd is too old for.
            "--watch-cache=false",
            "--service-cluster-ip-range=10.255.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.folder / 'accounts.key'}",
            f"--service-account-signing-key-file={self.folder / 'accounts.key'}",
        )
        self.wait("the API server", lambda: self.client.get("/readyz").status_code == 200)
        self.start(
            "kube-controller-manager",
            assets / "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig('admin')}",
            f"--service-account-private-key-file={self.folder / 'accounts.key'}",
            f"--root-ca-file={self.folder / 'ca.crt'}",
            # No kubelet renews leases here, so this controller would mark the node as lost.
            "--controllers=*,-node-lifecycle-controller",
            f"--secure-port={free_port()}",
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
        )
        crds = Path(os.environ["KUBERAY_CRDS"])
        self.apply(obj for path in crds.glob("*.yaml") for obj in yaml.safe_load_all(path.read_text()) if obj)
        self.wait("KubeRay's kinds", lambda: len(self._discover("apis/ray.io/v1")) >= 4)
        self.kubectl("create", "clusterrolebinding", "operator", "--clusterrole=kuberay-operator", "--user=operator")
        # `--use-kubernetes-proxy` needs this role: here the operator cannot connect to pods directly.
        proxy = {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "proxy"},
            "rules": [
                {
                    "apiGroups": [""],
                    "resources": ["services/proxy", "pods/proxy"],
                    "verbs": ["get", "create", "update", "delete"],
                },
            ],
        }
        self.apply([proxy])
        self.kubectl("create", "clusterrolebinding", "proxy", "--clusterrole=proxy", "--user=operator")
        self.start(
            "operator",
            Path(os.environ["KUBERAY_OPERATOR"]),
            "--use-kubernetes-proxy",
            "--enable-leader-election=false",
            f"--metrics-addr=127.0.0.1:{free_port()}",
            f"--health-probe-bind-address=127.0.0.1:{free_port()}",
            f"--kubeconfig={self.kubeconfig('operator')}",
        )

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        self.client.close()

    def start(self, name: str, program: Path, *arguments: str) -> None:
        """Start one of the programs. Its output goes to the file NAME.log in `folder`."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen([str(program), *arguments], stdout=log, stderr=log)

    def kubeconfig(self, user: str) -> Path:
        """Write a kubeconfig for one of the users, and return its path."""
        path = self.folder / f"{user}.yaml"
        server = {"server": self.url, "certificate-authority": str(self.folder / "ca.crt")}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": server}],
            "users": [{"name": user, "user": {"token": self.tokens[user]}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
            "current-context": "test",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def kubectl(self, *arguments: str) -> str:
        """Run kubectl as the administrator, and return its output. Raises `AssertionError` with its message."""
        program = find_kubectl()
        assert program
        done = subprocess.run(
            [program, f"--kubeconfig={self.kubeconfig('admin')}", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def apply(self, objects: Iterable[KubeObject]) -> None:
        """Server-side apply, in order. Raises `AssertionError` for a refusal, an unknown field or a warning."""
        for obj in objects:
            group = f"apis/{obj['apiVersion']}" if "/" in obj["apiVersion"] else f"api/{obj['apiVersion']}"
            plural, namespaced = self._discover(group)[obj["kind"]]
            folder = f"namespaces/{obj['metadata'].get('namespace', 'default')}/{plural}" if namespaced else plural
            response = self.client.patch(
                f"/{group}/{folder}/{obj['metadata']['name']}",
                params={"fieldManager": "test", "fieldValidation": "Strict"},
                content=json.dumps(obj),
                headers={"Content-Type": "application/apply-patch+yaml"},
            )
            assert response.status_code in (200, 201), f"{obj['kind']} {obj['metadata']['name']}: {response.text}"
            assert "Warning" not in response.headers, (obj["metadata"]["name"], response.headers["Warning"])

    def _discover(self, group: str) -> dict[str, tuple[str, bool]]:
        """Return each kind's plural, and whether its objects are in namespaces."""
        found = self.client.get(f"/{group}").raise_for_status().json()["resources"]
        return {one["kind"]: (one["name"], one["namespaced"]) for one in found if "/" not in one["name"]}

    def call(
        self, method: str, path: str, body: KubeObject | None = None, kind: str = "application/json"
    ) -> KubeObject:
        """Call the API as the administrator. The JSON of an error response has its status as `code`."""
        response = self.client.request(method, path, json=body, headers={"Content-Type": kind} if body else {})
        found: KubeObject = response.json()
        return found

    def list(self, plural: str, **labels: str) -> list[KubeObject]:
        """Return the namespace's objects of a kind with all these labels, oldest first."""
        groups = {"jobs": "apis/batch/v1", "cronjobs": "apis/batch/v1", "poddisruptionbudgets": "apis/policy/v1"}
        group = groups.get(plural, "apis/ray.io/v1" if plural.startswith("ray") else "api/v1")
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        response = self.client.get(f"/{group}/namespaces/{NAMESPACE}/{plural}", params={"labelSelector": selector})
        found: list[KubeObject] = response.raise_for_status().json()["items"]
        return sorted(found, key=lambda obj: obj["metadata"]["creationTimestamp"])

    def wait(self, what: str, found: Callable[[], Any], seconds: float = 60) -> Any:
        """Call `found` until it returns something true, and return this. Raises `AssertionError` after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if result := found():
                    return result
            except (httpx2.HTTPError, KeyError, IndexError):
                pass
            ended = [name for name, process in self.processes.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = {name: (self.folder / f"{name}.log").read_text()[-1500:] for name in ended or self.processes}
                raise AssertionError(f"{what}: not within {seconds} s; ended: {ended}; {logs}")
            time.sleep(0.2)


class Nodes:
    """A simulated node without limits, as a context manager. Its kubelet reports every pod as running.

    A launcher's pod is its rendered command as a process, with a token of its service account. A submitter's pod
    submits its job to `ray`.
    """

    def __init__(self, plane: ControlPlane, ray: Ray) -> None:
        self.plane, self.ray = plane, ray
        self.address = own_address()
        self.launchers: dict[str, subprocess.Popen[str]] = {}
        self.printed: list[str] = []
        self.unready: set[str] = set()
        """Pods that fail their readiness probes, as "COMPONENT NODE-TYPE"."""
        self._known: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._problem: Exception | None = None

    def __enter__(self) -> Self:
        self.plane.call("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node"}})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for process in self.launchers.values():
            process.terminate()
            process.wait(30)
        if self._problem:
            raise self._problem

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.2):
                for pod in self.plane.list("pods"):
                    self._sync(pod)
        except Exception as problem:
            self._problem = problem

    def _sync(self, pod: KubeObject) -> None:
        meta, name = pod["metadata"], pod["metadata"]["name"]
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{name}"
        phase = pod["status"].get("phase")
        if meta.get("deletionTimestamp"):
            if process := self.launchers.get(name):
                process.terminate()
                process.wait(30)
                self._exited(pod)
            elif phase == "Running":
                self._report(pod, "Failed", code=143)
            self.plane.call("DELETE", path, {"gracePeriodSeconds": 0})
        elif not pod["spec"].get("nodeName"):
            binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}}
            self.plane.call("POST", f"{path}/binding", {**binding, "target": {"kind": "Node", "name": "node"}})
        elif meta["uid"] not in self._known:
            self._known.add(meta["uid"])
            if meta["labels"].get("app.kubernetes.io/component") == "launcher":
                self._launch(pod)
            elif submitter := meta["labels"].get("batch.kubernetes.io/job-name"):
                self.ray.submit(submitter, json.dumps(pod["spec"]))
            self._report(pod, "Running")
        elif name in self.launchers:
            if self.launchers[name].poll() is not None:
                self._exited(pod)
        elif phase == "Running" and (submitter := meta["labels"].get("batch.kubernetes.io/job-name")):
            if self.ray.is_over(submitter):
                self._report(pod, "Succeeded", code=0)
        elif phase == "Running" and self._is_ready(pod) != ("Ready" in _true(pod)):
            self._report(pod, "Running")

    def _is_ready(self, pod: KubeObject) -> bool:
        labels = pod["metadata"]["labels"]
        return f"{labels.get('app.kubernetes.io/component')} {labels.get('ray.io/node-type')}" not in self.unready

    def _launch(self, pod: KubeObject) -> None:
        """Start the rendered command, with variables from the pod's fields and a token from the API server."""
        meta, spec = pod["metadata"], pod["spec"]
        (container,) = spec["containers"]
        path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{spec['serviceAccountName']}/token"
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
        account = self.plane.folder / meta["name"]
        account.mkdir()
        (account / "token").write_text(self.plane.call("POST", path, asked)["status"]["token"])
        (account / "ca.crt").write_bytes((self.plane.folder / "ca.crt").read_bytes())
        env = dict(os.environ)
        for entry in container["env"]:
            field = entry["valueFrom"]["fieldRef"]["fieldPath"]
            env[entry["name"]] = NAMESPACE if field == "metadata.namespace" else meta["labels"][field.split("'")[1]]
        env |= {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.plane.port)}
        command = [sys.executable, *container["command"][1:], "--account", str(account)]
        command += ["--poll-seconds", "0.2", "--pause-seconds", "0.5"]
        self.launchers[meta["name"]] = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _exited(self, pod: KubeObject) -> None:
        process = self.launchers.pop(pod["metadata"]["name"])
        self.printed.append(process.communicate()[0])
        self._report(pod, "Failed" if process.returncode else "Succeeded", code=process.returncode)

    def _report(self, pod: KubeObject, phase: str, code: int | None = None) -> None:
        """Write a pod's status as a kubelet does. `code` is the exit code of its containers if they have ended."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        ready = phase == "Running" and self._is_ready(pod)
        state: KubeObject = {"running": {"startedAt": now}}
        if code is not None:
            state = {"terminated": {"exitCode": code, "startedAt": now, "finishedAt": now}}
        containers = [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": "simulated",
                "restartCount": 0,
                "ready": ready,
                "started": True,
                "state": state,
            }
            for container in pod["spec"]["containers"]
        ]
        kept = [c for c in pod["status"].get("conditions", []) if c["type"] in ("PodScheduled", "DisruptionTarget")]
        conditions = [
            {"type": kind, "status": str(ready), "lastTransitionTime": now} for kind in ("Ready", "ContainersReady")
        ]
        status = {
            "phase": phase,
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "startTime": pod["status"].get("startTime", now),
            "conditions": [*kept, *conditions],
            "containerStatuses": containers,
        }
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}/status"
        self.plane.call("PATCH", path, {"status": status}, "application/merge-patch+json")


def _true(pod: KubeObject) -> set[str]:
    return {c["type"] for c in pod["status"].get("conditions", []) if c["status"] == "True"}


class Ray:
    """Simulated Ray: the dashboards of all heads, and the health checks of all Serve proxies, on the pods' ports.

    `drivers` has the end of each submitted driver: its exit code, or "stopped", or None if it still runs.
    """

    def __init__(self) -> None:
        self.drivers: list[int | str | None] = []
        self.submitted: list[str] = []
        """The names of the RayJobs whose drivers started."""
        self.ids: dict[str, str] = {}
        self.applications: list[KubeObject] = []
        """The Serve configs that the operator sent."""
        self.health = "RUNNING"
        """The reported status of every Serve application."""
        self._servers: list[ThreadingHTTPServer] = []
        self._begun = time.time()
        self._end_times: dict[str, int] = {}

    def __enter__(self) -> Self:
        ray = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.respond(*ray.respond(self.path))

            def do_PUT(self) -> None:
                ray.applications.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.respond(200, {})

            def respond(self, code: int, body: Any) -> None:
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response_only(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        for port in (8265, 8000):
            server = ThreadingHTTPServer((own_address(), port), Handler)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self._servers.append(server)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def submit(self, name: str, spec: str) -> None:
        """Submit a job, as a submitter's pod does. `spec` is the pod's, whose command contains the job's id."""
        found = re.search(rf"--submission-id ({re.escape(name)}-[a-z0-9]{{5}}) ", spec)
        assert found, spec
        self.ids[found[1]] = name
        self.submitted.append(name)

    def ended(self, name: str) -> int | str | None:
        """Return how a job ended; None while it runs."""
        number = self.submitted.index(name)
        return self.drivers[number] if number < len(self.drivers) else None

    def is_over(self, name: str) -> bool:
        return self.ended(name) is not None

    def respond(self, path: str) -> tuple[int, Any]:
        """Return the dashboard's response to a GET request: status and body."""
        path = path.partition("?")[0].rstrip("/")
        if path.endswith("/-/healthz"):
            return 200, "success"
        if path == "/api/serve/applications":
            names = [app["name"] for app in (self.applications or [{"applications": []}])[-1]["applications"]]
            apps = {name: {"name": name, "status": self.health, "deployments": {}} for name in names}
            return 200, {"applications": apps}
        if path == "/api/jobs":
            return 200, [self.job(found) for found in self.ids]
        found = path.rpartition("/")[2]
        return (200, self.job(found)) if found in self.ids else (404, "no such job")

    def job(self, found: str) -> KubeObject:
        """Return the dashboard's description of a job."""
        end = self.ended(self.ids[found])
        job: KubeObject = {
            "submission_id": found,
            "type": "SUBMISSION",
            "status": "RUNNING",
            "start_time": int(1000 * self._begun),
            "entrypoint": "",
        }
        if end is None:
            return job
        job["end_time"] = self._end_times.setdefault(found, int(1000 * time.time()))
        if end == 0:
            return {**job, "status": "SUCCEEDED"}
        if end == "stopped":
            return {**job, "status": "STOPPED"}
        words = f"Job entrypoint command failed with exit code {end}, last available logs (truncated):\nFAILED 2"
        return {**job, "status": "FAILED", "message": words}
