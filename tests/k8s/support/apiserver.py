"""A small Kubernetes API server for tests: real HTTPS over a store, with the semantics that the launcher meets.

It keeps a name for one object of a kind, checks every object against Kubernetes' and KubeRay's schemas, lets an account
do what the rendered roles let it, deletes what a deleted object owns, and goes by a clock that a test can put forward.
Knows nothing of watches, versions of objects, patches, quotas or admission. Who acts on the objects is in
`tests.k8s.support.controllers`.
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

Thing = dict[str, Any]


class Conflict(Exception):
    """An object of this kind and name is there already: 409 AlreadyExists."""


class Store:
    """Objects by (plural, name) in one namespace, on a clock of its own. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.objects: dict[tuple[str, str], Thing] = {}
        self.events: list[str] = []
        self._ahead = 0.0

    def now(self) -> float:
        """Seconds since the epoch, here."""
        return time.time() + self._ahead

    def pass_time(self, seconds: float) -> None:
        """Put the clock forward."""
        self._ahead += seconds

    def create(self, thing: Thing) -> Thing:
        """Raises `Conflict`; `jsonschema.ValidationError` for what the schemas refuse."""
        with self.lock:
            plural, name = PLURALS[thing["kind"]], thing["metadata"]["name"]
            if (plural, name) in self.objects:
                raise Conflict(f'{plural} "{name}" already exists')
            check({key: value for key, value in thing.items() if key != "status"})
            made = copy.deepcopy(thing)
            made["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": timestamp(self.now())}
            made["metadata"].setdefault("namespace", NAMESPACE)
            made.setdefault("status", {})
            self.objects[plural, name] = made
            return made

    def get(self, plural: str, name: str) -> Thing | None:
        """The object itself, not a copy: controllers write its status in place."""
        return self.objects.get((plural, name))

    def list(self, plural: str, **labels: str) -> list[Thing]:
        """The objects of a kind with all these labels, oldest first."""
        with self.lock:
            return [
                thing
                for (kind, _), thing in self.objects.items()
                if kind == plural and labels.items() <= thing["metadata"].get("labels", {}).items()
            ]

    def owned(self, plural: str, owner: Thing) -> Iterator[Thing]:
        """What has `owner` among its owners."""
        for thing in self.list(plural):
            if owner["metadata"]["uid"] in [ref["uid"] for ref in thing["metadata"].get("ownerReferences", [])]:
                yield thing

    def delete(self, plural: str, name: str) -> None:
        """The object and, as the garbage collector does in the background, all that it owns."""
        with self.lock:
            thing = self.objects.pop((plural, name), None)
            if thing:
                for kind in set(PLURALS.values()):
                    for below in list(self.owned(kind, thing)):
                        self.delete(kind, below["metadata"]["name"])

    def say(self, reason: str, message: str) -> None:
        """Record an event."""
        self.events.append(f"{reason}: {message}")

    def may(self, account: str, verb: str, group: str, resource: str, name: str) -> bool:
        """Whether the roles bound to a service account allow this."""
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
                    # A name in a rule never allows `create` or `list`: those requests carry none.
                    and (not names or name in names)
                ):
                    return True
        return False


class ApiServer:
    """A store behind HTTPS on a loopback port. To be used in a `with`; `folder` becomes a service account's."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.calls: list[tuple[str, str, int]] = []
        self.tokens: dict[str, str] = {}
        self.failures: list[int] = []
        """Statuses that the next calls get, whatever they ask."""
        self.removed: set[str] = set()
        """Kinds, by plural, that this server does not know: their definitions are not installed."""
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        authority.cert_pem.write_to_path(str(folder / "ca.crt"))
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
        """A new token for the account, in its folder; the ones before end."""
        self.tokens = {uuid.uuid4().hex: account}
        (self.folder / "token").write_text(next(iter(self.tokens)))

    def handle(self, method: str, url: str, authorization: str, body: bytes) -> tuple[int, Thing]:
        """Answer one call: authentication, then permission, then the object, as a real server goes about it."""
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
        if not self.store.may(account, verb, group, plural, name):
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
            thing = copy.deepcopy(self.store.get(plural, name))
        return (200, thing) if thing else (404, {"message": f'{plural} "{name}" not found'})


def timestamp(seconds: float) -> str:
    """Kubernetes' form of a time."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_of(stamp: str) -> float:
    """The reverse of `timestamp`."""
    return datetime.fromisoformat(stamp).timestamp()
