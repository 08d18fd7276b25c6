"""The edge of the endpoint in `sightline serve`: many connections, unusual requests, CORS, and killed processes."""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from serve.rayserve import guard
from tests.support.served_endpoint import Served, run_command
from tests.support.cross_origin import ALLOWED, check_cross_origin
from tests.support.endpoint import EXAMPLE

IDLE = 4200
HOST = b"Host: localhost\r\n"
JSON = b"Content-Type: application/json\r\nContent-Length: 2\r\n"
REQUESTS = {
    # the request, and the status behind HAProxy and behind Ray Serve's own proxy
    b"OPTIONS /v1/embeddings HTTP/1.1\r\n" + HOST: (405, 405),
    b"OPTIONS * HTTP/1.1\r\n" + HOST: (404, 404),
    b"TRACE / HTTP/1.1\r\n" + HOST: (405, 405),
    b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n": (405, 400),
    b"FOO / HTTP/1.1\r\n" + HOST: (405, 400),
    b"DELETE /v1/models HTTP/1.1\r\n" + HOST: (405, 405),
    b"GET /nothing HTTP/1.1\r\n" + HOST: (404, 404),
    b"GET /healthz HTTP/1.0\r\n" + HOST: (200, 200),
    b"GET http://localhost/v1/models HTTP/1.1\r\n" + HOST: (200, 200),
    b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: evil.example\r\n": (403, 403),
    b"POST /v1/embeddings HTTP/1.1\r\nExpect: 100-continue\r\n" + HOST + JSON: (100, 100),
    b"GET /v1/models HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n" + HOST: (200, 200),
    b"GET /v1/models HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" + HOST: (403, 403),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edge") / "endpoint.yaml"
    path.write_text(EXAMPLE.read_text() + f"\ncors: {{origins: ['{ALLOWED}']}}\n")
    return path


@pytest.fixture(scope="module")
def served(config: Path) -> Iterator[Served]:
    """The command with HAProxy."""
    with run_command("127.0.0.1", config) as running:
        yield running


@pytest.fixture(scope="module")
def without_haproxy(config: Path) -> Iterator[Served]:
    """The command with Ray Serve's own proxy."""
    with run_command("127.0.0.1", config, haproxy=False) as running:
        yield running


def exchange(port: int, request: bytes, source: str = "127.0.0.1") -> str:
    """Send bytes on a new connection. Returns the first bytes of the response."""
    with socket.create_connection(("127.0.0.1", port), timeout=60, source_address=(source, 0)) as connection:
        connection.sendall(request + b"\r\n")
        return connection.recv(10_000).decode()


def test_cross_origin_requests_behind_haproxy(served: Served) -> None:
    with httpx.Client(base_url=served.url, headers={"host": "localhost"}) as client:
        check_cross_origin(client)


def test_cross_origin_requests_behind_ray_serves_own_proxy(without_haproxy: Served) -> None:
    with httpx.Client(base_url=without_haproxy.url, headers={"host": "localhost"}) as client:
        check_cross_origin(client)


def test_unusual_requests_behind_haproxy(served: Served) -> None:
    statuses = {request: int(exchange(served.port, request).split()[1]) for request in REQUESTS}
    assert statuses == {request: behind for request, (behind, _) in REQUESTS.items()}
    assert "allow: GET, HEAD, POST, OPTIONS" in exchange(served.port, b"FOO / HTTP/1.1\r\n" + HOST)


def test_unusual_requests_behind_ray_serves_own_proxy(without_haproxy: Served) -> None:
    statuses = {request: int(exchange(without_haproxy.port, request).split()[1]) for request in REQUESTS}
    assert statuses == {request: behind for request, (_, behind) in REQUESTS.items()}


def test_idle_connections_of_one_address_lock_nobody_out(served: Served) -> None:
    """One request on each connection, which is then left open: many times the connections of a well-behaved client."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = IDLE + 1000
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted) if hard < 0 else min(hard, max(soft, wanted)), hard))
    request = b"GET /healthz HTTP/1.1\r\n" + HOST
    found: Counter[str] = Counter()
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.socket()) for _ in range(IDLE)]
        for connection in idle:
            connection.settimeout(60)
            with suppress(ConnectionResetError, BrokenPipeError):
                connection.connect(("127.0.0.1", served.port))
                connection.sendall(request + b"\r\n")
        assert " 200 " in exchange(served.port, request, source="127.0.0.2")
        for connection in idle:
            try:
                found[connection.recv(10_000)[9:12].decode()] += 1
            except OSError as error:
                found[type(error).__name__] += 1
        for source in ("127.0.0.1", "127.0.0.2"):
            assert " 200 " in exchange(served.port, request, source)
    assert found["200"] > 100
    assert found["429"] > 100
    assert set(found) <= {"200", "429", "", "ConnectionResetError", "BrokenPipeError"}, found
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Load:
    """Clients that send one request after the other until the `with` block ends."""

    def __init__(self, url: str, clients: int = 4) -> None:
        self._url = url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(clients)]
        self.results: list[tuple[float, int]] = []
        """When each request ended, and its status, 0 if there was no response."""

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        body = {"model": "tiny", "input": "a red circle"}
        with httpx.Client(base_url=self._url, timeout=60, headers={"host": "localhost"}) as client:
            while not self._over.is_set():
                status = 0
                with suppress(httpx.TransportError):
                    status = client.post("/v1/embeddings", json=body).status_code
                self.results.append((time.monotonic(), status))

    def await_success(self, since: float) -> None:
        """Wait until a request after `since` was answered with 200."""
        while not any(when > since and status == 200 for when, status in list(self.results)):
            assert time.monotonic() < since + 90, "no request succeeded any more"
            time.sleep(0.01)

    def failed(self, since: float) -> list[tuple[float, int]]:
        """The requests after `since` that did not succeed."""
        return [(when, status) for when, status in self.results if when > since and status != 200]


def await_haproxy(admin: Path, previous: int) -> None:
    """Wait until Ray Serve has started another HAProxy than `previous`, and this one has taken over."""
    give_up = time.monotonic() + 120
    while guard.find_pid(admin) in (None, previous) or guard.find_pid(admin.with_name(guard.SPARE_SOCKET)):
        assert time.monotonic() < give_up, "Ray Serve started no other HAProxy"
        time.sleep(0.1)


def test_a_stand_in_serves_until_ray_serve_has_started_another_haproxy(served: Served) -> None:
    """Only the requests in progress fail, and those in the moment before the stand-in listens."""
    admin = served.admin_socket()
    with Load(served.url) as load:
        load.await_success(0)
        haproxy = guard.find_pid(admin)
        assert haproxy is not None
        os.kill(haproxy, signal.SIGKILL)
        killed = time.monotonic()
        load.await_success(killed)
        back = next(when for when, status in load.results if when > killed and status == 200)
        load.await_success(back + 0.5)  # the requests that had failed at the same time
        await_haproxy(admin, haproxy)
        load.await_success(time.monotonic() + 2)  # the change from the stand-in to the new HAProxy
    assert load.failed(back + 0.5) == []


def test_a_haproxy_whose_actor_was_killed_serves_until_its_successor_takes_over(served: Served) -> None:
    admin = served.admin_socket()
    haproxy = guard.find_pid(admin)
    assert haproxy is not None
    with Load(served.url) as load:
        load.await_success(0)
        served.find("HAProxyManager").kill()
        await_haproxy(admin, haproxy)
        load.await_success(time.monotonic() + 2)
    assert load.failed(0) == []
