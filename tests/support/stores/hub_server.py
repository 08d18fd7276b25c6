"""A stand-in for the Hugging Face hub on loopback: the part of its HTTP API with which datasets are listed and read.

It was written after the client library's source: the paths, pages by the `Link` header, the headers `X-Repo-Commit`,
`X-Linked-Etag` and `X-Linked-Size`, the codes in `X-Error-Code`, and redirects: of a large file to another host with a
signed URL, of a small one to the hub's cache, and of a dataset that was renamed. The other host is a second server with
another port, which refuses requests with a token, as the hub's storage does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

PAGE = 1000
_IN_GIT = (".txt", ".csv", ".tsv", ".md", ".json", ".jsonl", ".gitattributes")
"""Suffixes of files that are in Git itself. All others are in LFS."""
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_DATASET = r"/(?:api/)?datasets/(?P<repo>[^/]+/[^/]+)"
_API = re.compile(rf"{_DATASET}/(?P<call>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
_RESOLVE = re.compile(rf"{_DATASET}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_ACCESS = re.compile(rf"{_DATASET}/auth-check")
_CACHE = re.compile(r"/api/resolve-cache/datasets/(?P<repo>[^/]+/[^/]+)/(?P<commit>[0-9a-f]{40})/(?P<path>.+)")


@dataclass(frozen=True)
class Reply:
    """A response of the server."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


def refuse(status: int, code: str = "", message: str = "") -> Reply:
    """Return an error as the hub sends it."""
    headers = {"Content-Type": "application/json; charset=utf-8"}
    headers |= {"X-Error-Code": code} if code else {}
    headers |= {"X-Error-Message": message} if message else {}
    return Reply(status, headers, json.dumps({"error": message}).encode())


NO_REPOSITORY = refuse(401, "RepoNotFound", "Repository not found")
NO_REVISION = refuse(404, "RevisionNotFound", "Invalid rev id")
NO_ENTRY = refuse(404, "EntryNotFound", "Entry not found")
GATED = refuse(403, "GatedRepo", "Access to dataset is restricted and you are not in the authorized list.")
DISABLED = refuse(403, "", "Access to this resource is disabled.")
EXPIRED = refuse(401, "", "Invalid credentials in Authorization header")
LOGIN_PAGE = Reply(200, {"Content-Type": "text/html", "ETag": '"1"'}, b"<html>Welcome to the network</html>")


@dataclass(frozen=True)
class File:
    """A file of a dataset, in Git itself or in LFS."""

    data: bytes
    in_lfs: bool

    @cached_property
    def sha256(self) -> str:
        """The hash of the content."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """The text that Git has in place of a file in LFS."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def blob(self) -> str:
        """The hash that Git has."""
        stored = self.pointer if self.in_lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored, usedforsecurity=False).hexdigest()

    @property
    def etag(self) -> str:
        """What the hub sends as ETag: the hash of the content, or Git's."""
        return self.sha256 if self.in_lfs else self.blob

    def describe(self, path: str) -> dict[str, Any]:
        """Return the file as listings have it."""
        found = {"type": "file", "oid": self.blob, "size": len(self.data), "path": path}
        if self.in_lfs:
            found["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
            found["xetHash"] = self.sha256[::-1]
        return found


@dataclass
class Dataset:
    """A dataset: its commits, and the branches, tags and other refs that name them."""

    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    refused: Reply | None = None
    """What a request without the right token gets."""
    gated: bool = False
    """Whether the files, but not their names, are refused to requests without the right token."""


class HubServer:
    """A running server, with the host of the large files. `stop` ends both.

    `requests` has method and path with query of each request to the hub, `fetches` those to the other host, and
    `tokens` what each of these sent as `Authorization`. `faults` are asked for a reply before anything else is done.
    """

    def __init__(self) -> None:
        self.datasets: dict[str, Dataset] = {}
        self.renamed: dict[str, str] = {}
        self.token = "hf_right"
        self.requests: list[tuple[str, str]] = []
        self.fetches: list[tuple[str, str]] = []
        self.tokens: list[str] = []
        self.faults: list[Callable[[str, str], Reply | None]] = []
        self.page = PAGE
        self.link_address = ""
        """The address in `Link` headers, if it is not the server's own: mirrors leave the hub's there."""
        self.signature = 1
        """The valid signature of URLs of files."""
        self._lock = threading.Lock()
        self._files: dict[tuple[bytes, bool], File] = {}
        self._stored: dict[str, File] = {}
        self._trees: dict[tuple[str, str, str, str | None], list[dict[str, Any]]] = {}
        self._servers = [_serve(self.answer), _serve(self.send_file)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    @property
    def env(self) -> dict[str, str]:
        """The environment variables that a client needs."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN_PATH": "/nowhere/token"}

    def use(self, monkeypatch: pytest.MonkeyPatch, token: str = "", endpoint: str | None = None) -> None:
        """Make this the hub of the process, with this token or none, whatever the machine has. Forgets all requests."""
        for name, value in {**self.env, "HF_ENDPOINT": endpoint or self.endpoint, "HF_TOKEN": token}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        self.clear()

    def commit(
        self, repo: str, files: Mapping[str, bytes | None], ref: str = "main", lfs: bool | None = None
    ) -> dict[str, str]:
        """Commit files to a ref, None removes one. Returns the ETag of each. Makes the dataset if there is none.

        With `lfs` None, the suffix decides whether a file is in LFS.
        """
        with self._lock:
            dataset = self.datasets.setdefault(repo, Dataset())
            tree = dict(dataset.commits.get(dataset.refs.get(ref, ""), {}))
            for path, data in files.items():
                if data is None:
                    del tree[path]
                else:
                    in_lfs = not path.endswith(_IN_GIT) if lfs is None else lfs
                    tree[path] = self._files.setdefault((data, in_lfs), File(data, in_lfs))
            text = repr((len(dataset.commits), sorted((path, file.blob) for path, file in tree.items())))
            sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
            dataset.commits[sha] = tree
            dataset.refs[ref] = sha
            return {path: tree[path].etag for path in files if path in tree}

    @contextmanager
    def fault(self, pattern: str, reply: Reply, times: int | None = 1) -> Iterator[list[str]]:
        """Reply so to the next requests of which `METHOD path` matches. Yields a list with them."""
        done: list[str] = []

        def find(method: str, path: str) -> Reply | None:
            if not re.search(pattern, f"{method} {path}") or (times is not None and len(done) >= times):
                return None
            done.append(path)
            return reply

        self.faults.append(find)
        try:
            yield done
        finally:
            self.faults.remove(find)

    def clear(self) -> None:
        """Forget the requests so far."""
        for seen in (self.requests, self.fetches, self.tokens):
            seen.clear()

    def stop(self) -> None:
        """End the servers."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> Reply:
        """Return the hub's response to a request."""
        method, token = request.command, request.headers.get("Authorization", "")
        with self._lock:
            self.requests.append((method, request.path))
            found = next((reply for find in self.faults if (reply := find(method, request.path))), None)
        if found is not None:
            return found
        parts = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if cached := _CACHE.fullmatch(parts.path):
            file = self.datasets[cached["repo"]].commits[cached["commit"]][unquote(cached["path"])]
            return _send(file, request, {"ETag": f'"{file.etag}"', "X-Repo-Commit": cached["commit"]})
        match = _API.fullmatch(parts.path) or _RESOLVE.fullmatch(parts.path) or _ACCESS.fullmatch(parts.path)
        if match is None:
            return Reply(404, {"Content-Type": "text/html"}, b"<html>Sorry, we can't find the page.</html>")
        repo = match["repo"]
        if repo in self.renamed:
            return Reply(307, {"Location": request.path.replace(repo, self.renamed[repo], 1)}, b"Temporary Redirect")
        dataset = self.datasets.get(repo)
        if token not in ("", f"Bearer {self.token}"):
            return EXPIRED
        if dataset is None or (dataset.refused is not None and not token):
            return NO_REPOSITORY if dataset is None or dataset.refused is None else dataset.refused
        if dataset.gated and not token and match.re is not _API:
            return GATED
        if match.re is _ACCESS:
            return Reply(200, {"Content-Type": "text/plain"}, b"OK")
        revision = unquote(match["revision"])
        commit = dataset.refs.get(revision, revision)
        if commit not in dataset.commits:
            return NO_REVISION
        path = unquote(match["path"] or "")
        if match.re is _RESOLVE:
            return self._resolve(repo, commit, dataset.commits[commit].get(path), path)
        if match["call"] == "revision":
            return _as_json({"_id": "1", "id": repo, "sha": commit, "gated": "auto" if dataset.gated else False})
        if match["call"] == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            tree = dataset.commits[commit]
            return _as_json([tree[path].describe(path) for path in wanted if path in tree])
        return self._list(repo, commit, path, query, parts.path)

    def _resolve(self, repo: str, commit: str, file: File | None, path: str) -> Reply:
        if file is None:
            return Reply(NO_ENTRY.status, {**NO_ENTRY.headers, "X-Repo-Commit": commit}, NO_ENTRY.body)
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        if not file.in_lfs:
            location = f"/api/resolve-cache/datasets/{repo}/{commit}/{quote(path)}?etag={file.etag}"
            return Reply(307, {**headers, "Location": location}, b"Temporary Redirect")
        with self._lock:
            self._stored[file.sha256] = file
        location = f"{self.storage}/{file.sha256}?X-Amz-Expires=3600&Signature={self.signature}"
        return Reply(302, {**headers, "Location": location}, b"Found. Redirecting")

    def _list(self, repo: str, commit: str, folder: str, query: dict[str, str], path: str) -> Reply:
        key = repo, commit, folder, query.get("recursive")
        if key not in self._trees:
            tree = self.datasets[repo].commits[commit]
            self._trees[key] = _describe_tree(tree, folder, query.get("recursive") == "true")
        entries = self._trees[key]
        if folder and not entries:
            return NO_ENTRY
        start = int(base64.b64decode(query.get("cursor", "") or base64.b64encode(b"0")))
        stop = start + self.page
        reply = _as_json(entries[start:stop])
        if stop >= len(entries):
            return reply
        cursor = quote(base64.b64encode(str(stop).encode()).decode())
        address = self.link_address or self.endpoint
        link = f'<{address}{path}?recursive={query.get("recursive")}&limit={self.page}&cursor={cursor}>; rel="next"'
        return Reply(200, {**reply.headers, "Link": link}, reply.body)

    def send_file(self, request: BaseHTTPRequestHandler, body: bytes) -> Reply:
        """Return the response of the host of large files."""
        parts = urlsplit(request.path)
        with self._lock:
            self.fetches.append((request.command, request.path))
            self.tokens.append(request.headers.get("Authorization", ""))
        if request.headers.get("Authorization"):
            return Reply(400, {}, b"<Error><Message>Only one auth mechanism allowed</Message></Error>")
        if parse_qs(parts.query).get("Signature") != [str(self.signature)]:
            return Reply(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
        file = self._stored.get(parts.path.strip("/"))
        return Reply(404) if file is None else _send(file, request, {"ETag": f'"{file.sha256}"'})


def _describe_tree(tree: Mapping[str, File], folder: str, recursive: bool) -> list[dict[str, Any]]:
    below = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path, file in sorted(tree.items()):
        if not path.startswith(below):
            continue
        parts = path[len(below) :].split("/")
        for depth in range(1, len(parts)):
            name = below + "/".join(parts[:depth])
            if recursive or depth == 1:
                found.setdefault(name, {"type": "directory", "oid": "0" * 40, "size": 0, "path": name})
        if recursive or len(parts) == 1:
            found[path] = file.describe(path)
    return list(found.values())


def _send(file: File, request: BaseHTTPRequestHandler, headers: dict[str, str]) -> Reply:
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    wanted = _RANGE.fullmatch(request.headers.get("Range", ""))
    if wanted is None:
        return Reply(200, headers, file.data)
    size = len(file.data)
    start, stop = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
    if start >= size:
        return Reply(416, {"Content-Range": f"bytes */{size}"})
    return Reply(206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, file.data[start:stop])


def _as_json(value: Any) -> Reply:
    return Reply(200, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(value).encode())


class _Server(ThreadingHTTPServer):
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: a client that has what it needs closes the connection."""


def _serve(respond: Callable[[BaseHTTPRequestHandler, bytes], Reply]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            reply = respond(self, body)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if "Content-Length" not in reply.headers:
                self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)

        do_GET = do_HEAD = do_POST = handle_any  # noqa: N815

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server
