"""A small Kubernetes API server for tests: real HTTPS, and the semantics that the launcher depends on.

Names are unique per kind. Every object is checked against the schemas of Kubernetes and KubeRay. An account may do what
the rendered roles allow. Deleting an object deletes what it owns. A test can move the clock forward. There are no
watches, resource versions, patches, quotas or admission. `tests.k8s.support.controllers` acts on the objects.
"""

from __future__ import annotations

import copy
import json
import re
import ssl
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trustme
from jsonschema import ValidationError

from tests.k8s.support.schemas import check

NAMESPACE = "sightline"
PLURALS = {
    "ConfigMap": "configmaps",
    "CronJob": "cronjobs",
    "Job": "jobs",
    "NetworkPolicy": "networkpolicies",
    "Pod": "pods",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "RayCluster": "rayclusters",
    "RayCronJob": "raycronjobs",
    "RayJob": "rayjobs",
    "RayService": "rayservices",
    "Role": "roles",
    "RoleBinding": "rolebindings",
    "ServiceAccount": "serviceaccounts",
}

KubeObject = dict[str, Any]


class Conflict(Exception):
    """An object of this kind and name already exists: 409 AlreadyExists."""


class Store:
    """The objects of one namespace by (plural, name), with their own clock. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.objects: dict[tuple[str, str], KubeObject] = {}
        self.events: list[str] = []
        self._ahead = 0.0

    def now(self) -> float:
        """Return the store's time in seconds since the epoch."""
        return time.time() + self._ahead

    def pass_time(self, seconds: float) -> None:
        """Move the clock forward."""
        self._ahead += seconds

    def create(self, obj: KubeObject) -> KubeObject:
        """Create an object. Raises `Conflict`, or `jsonschema.ValidationError` if a schema refuses the object."""
        with self.lock:
            plural, name = PLURALS[obj["kind"]], obj["metadata"]["name"]
            if (plural, name) in self.objects:
                raise Conflict(f'{plural} "{name}" already exists')
            check({key: value for key, value in obj.items() if key != "status"})
            made = copy.deepcopy(obj)
            made["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": timestamp(self.now())}
            made["metadata"].setdefault("namespace", NAMESPACE)
            made.setdefault("status", {})
            self.objects[plural, name] = made
            return made

    def get(self, plural: str, name: str) -> KubeObject | None:
        """Return the object itself, not a copy, because controllers change its status in place."""
        return self.objects.get((plural, name))

    def list(self, plural: str, **labels: str) -> list[KubeObject]:
        """Return the objects of a kind with all these labels, oldest first."""
        with self.lock:
            return [
                obj
                for (kind, _), obj in self.objects.items()
                if kind == plural and labels.items() <= obj["metadata"].get("labels", {}).items()
            ]

    def owned(self, plural: str, owner: KubeObject) -> Iterator[KubeObject]:
        """Yield the objects that `owner` owns."""
        for obj in self.list(plural):
            if owner["metadata"]["uid"] in [ref["uid"] for ref in obj["metadata"].get("ownerReferences", [])]:
                yield obj

    def delete(self, plural: str, name: str) -> None:
        """Delete an object and all objects that it owns, as the garbage collector does."""
        with self.lock:
            obj = self.objects.pop((plural, name), None)
            if obj:
                for kind in set(PLURALS.values()):
                    for below in list(self.owned(kind, obj)):
                        self.delete(kind, below["metadata"]["name"])

    def record_event(self, reason: str, message: str) -> None:
        """Record an event."""
        self.events.append(f"{reason}: {message}")

    def is_allowed(self, account: str, verb: str, group: str, resource: str, name: str) -> bool:
        """Whether the roles of a service account allow a verb on a resource."""
        for binding in self.list("rolebindings"):
            if account not in [s["name"] for s in binding["subjects"] if s["kind"] == "ServiceAccount"]:
                continue
            role = self.get("roles", binding["roleRef"]["name"])
            for rule in role["rules"] if role else []:
                names = rule.get("resourceNames")
                if (
                    group in rule["apiGroups"]
                    and resource in rule["resources"]
                    and verb in rule["verbs"]
                    # A rule with names never allows `create` or `list`, because such requests have no name.
                    and (not names or name in names)
                ):
                    return True
        return False


class ApiServer:
    """HTTPS server of a store on a loopback port, as a context manager. `folder` gets a service account's files."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.calls: list[tuple[str, str, int]] = []
        self.tokens: dict[str, str] = {}
        self.failures: list[int] = []
        """Status codes of the next responses, for any request."""
        self.removed: set[str] = set()
        """Plurals of kinds whose definitions are not installed on this server."""
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        authority.cert_pem.write_to_path(str(folder / "ca.crt"))
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.respond("GET")

            def do_POST(self) -> None:
                self.respond("POST")

            def respond(self, method: str) -> None:
                length = int(self.headers.get("Content-Length", 0))
                code, body = api.handle(method, self.path, self.headers["Authorization"], self.rfile.read(length))
                data = json.dumps(body).encode()
                api.calls.append((method, self.path, code))
                self.send_response_only(code)
                self.send_header("Date", formatdate(api.store.now(), usegmt=True))
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> ApiServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def renew_token(self, account: str) -> None:
        """Write a new token for the account into its folder. Older tokens become invalid."""
        self.tokens = {uuid.uuid4().hex: account}
        (self.folder / "token").write_text(next(iter(self.tokens)))

    def handle(self, method: str, url: str, authorization: str, body: bytes) -> tuple[int, KubeObject]:
        """Handle a request in a real server's order: authentication, then authorization, then the object."""
        if self.failures:
            return self.failures.pop(0), {"message": "not now"}
        account = self.tokens.get((authorization or "").removeprefix("Bearer "))
        if account is None:
            return 401, {"message": "Unauthorized"}
        parts = urllib.parse.urlsplit(url)
        found = re.fullmatch(r"/apis/([^/]+)/[^/]+/namespaces/([^/]+)/([^/]+)(?:/([^/]+))?", parts.path)
        if not found or found[2] != NAMESPACE or found[3] in self.removed:
            return 404, {"message": "the server could not find the requested resource"}
        group, plural, name = found[1], found[3], found[4] or ""
        verb = {"GET": "get" if name else "list", "POST": "create"}[method]
        if not self.store.is_allowed(account, verb, group, plural, name):
            return 403, {"message": f'{plural}.{group} "{name}" is forbidden: {account} may not {verb} it'}
        if method == "POST":
            try:
                return 201, self.store.create(json.loads(body))
            except Conflict as conflict:
                return 409, {"message": str(conflict)}
            except ValidationError as error:
                return 422, {"message": error.message}
        with self.store.lock:
            if not name:
                selector = urllib.parse.parse_qs(parts.query).get("labelSelector", [""])[0]
                labels = dict(term.split("=") for term in selector.split(",") if term)
                return 200, {"items": copy.deepcopy(self.store.list(plural, **labels))}
            obj = copy.deepcopy(self.store.get(plural, name))
        return (200, obj) if obj else (404, {"message": f'{plural} "{name}" not found'})


def timestamp(seconds: float) -> str:
    """Format a time as Kubernetes does."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_of(stamp: str) -> float:
    """Parse a time in Kubernetes' format to seconds since the epoch."""
    return datetime.fromisoformat(stamp).timestamp()
