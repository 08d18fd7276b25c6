"""The edge of the endpoint in `sightline serve`: many connections, unusual requests, CORS, and killed processes."""

from __future__ import annotations

import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from serve.rayserve import guard
from tests.support.cross_origin import ALLOWED, check_cross_origin
from tests.support.endpoint import EXAMPLE
from tests.support.load import Load
from tests.support.served_endpoint import Served, run_command

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
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" + HOST: (404, 404),
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
        assert " 200 " in exchange(served.port, request, source="127.0.0.2")
        give_up = time.monotonic() + 60
        while " 200 " not in exchange(served.port, request, source="127.0.0.1"):  # a second after its last connections
            assert time.monotonic() < give_up
            time.sleep(0.1)
    assert found["200"] > 100
    assert found["429"] > 100
    assert set(found) <= {"200", "429", "", "ConnectionResetError", "BrokenPipeError"}, found
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def await_haproxy(admin: Path, previous: int) -> None:
    """Wait until Ray Serve has started another HAProxy than `previous`, and this one has taken over."""
    give_up = time.monotonic() + 120
    while guard.find_pid(admin) in (None, previous) or guard.find_pid(admin.with_name(guard.SPARE_SOCKET)):
        assert time.monotonic() < give_up, "Ray Serve started no other HAProxy"
        time.sleep(0.1)


@pytest.mark.parametrize("killed", ["bin/haproxy", "HAProxyManager"])
def test_a_stand_in_serves_until_ray_serve_has_started_another_haproxy(served: Served, killed: str) -> None:
    """Only the requests in progress fail, and those in the moment before the stand-in listens.

    With its actor, Ray also kills HAProxy.
    """
    admin = served.admin_socket()
    haproxy = guard.find_pid(admin)
    assert haproxy is not None
    with Load(served.url) as load:
        load.await_success(0)
        process = served.find(killed)
        process.kill()
        process.wait(60)
        with suppress(psutil.NoSuchProcess):
            psutil.Process(haproxy).wait(60)
        load.await_success(time.monotonic())
        back = time.monotonic() + 0.5  # by then, requests that had failed at the same time are over
        load.await_success(back)
        await_haproxy(admin, haproxy)
        load.await_success(time.monotonic() + 2)  # the change from the stand-in to the new HAProxy
    assert load.failed(back) == []
