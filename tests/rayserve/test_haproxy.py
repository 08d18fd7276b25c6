"""`sightline serve` behind Ray Serve's HAProxy: access without API keys, slow clients, and draining."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from json import dumps

import httpx
import pytest

from serve.rayserve.internals import ingress_ports
from tests.support.endpoint import data_uri, shape_png
from tests.support.served_endpoint import Served, run_command

BODY = {"image": data_uri(shape_png("red circle")), "label_set": "shapes"}
CLIENTS = 40
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """The command on ::1."""
    with run_command("::1") as running:
        yield running


def test_only_local_clients_are_answered(served: Served) -> None:
    with httpx.Client(base_url=f"http://[::1]:{served.port}", headers={"Host": "localhost"}) as client:
        assert client.get("/v1/models").status_code == 200
        # HAProxy overwrites what a client claims about its address, so the claim changes nothing.
        assert client.get("/v1/models", headers={"x-sightline-peer": "192.0.2.1"}).status_code == 200
        for forwarded in ("x-forwarded-for", "x-real-ip", "forwarded"):
            response = client.get("/v1/models", headers={forwarded: "127.0.0.1"})
            assert response.json()["error"]["code"] == "loopback_only"
        response = client.get("/v1/models", headers={"Host": "rebound.example"})
        assert response.json()["error"]["code"] == "loopback_only"


def test_an_ingress_refuses_requests_that_bypass_haproxy(served: Served) -> None:
    """Such requests have no header with the peer's address."""
    first, last = map(int, ingress_ports(served.port).values())
    direct = [number for number in range(first, min(first + 10, last)) if speaks_http(number)]
    assert direct, "the ingress listens on one of this endpoint's ports"
    for number in direct:
        response = httpx.get(f"http://127.0.0.1:{number}/v1/models")
        assert response.json()["error"]["code"] == "loopback_only"


def test_long_texts_reach_the_model_in_calls_of_the_allowed_size_and_are_counted(served: Served) -> None:
    """A call of the model may hold 4 MiB: less than 64 texts of a megabyte, and more than their first characters."""
    body = {"model": "tiny", "input": [f"{number} \U0001f431 " + "\U0001f431" * 30_000 for number in range(200)]}
    with httpx.Client(base_url=f"http://[::1]:{served.port}", headers={"Host": "localhost"}, timeout=120) as client:
        response = client.post("/v1/embeddings", content=dumps(body, ensure_ascii=False).encode(), headers=JSON)
        assert response.status_code == 200, response.text
        assert response.headers["x-sightline-truncated"] == "200"
        assert response.json()["usage"]["truncated_texts"] == 200
        refused = client.post("/v1/embeddings", json={"model": "tiny", "input": "a " * 500, "truncate": False})
        assert refused.json()["error"]["code"] == "text_too_long"


def test_headers_that_never_end_are_refused(served: Served) -> None:
    with socket.create_connection(("::1", served.port)) as slow:
        slow.settimeout(30)
        slow.sendall(b"GET / HTTP/1.1\r\nHost: ")
        assert b" 408 " in slow.recv(1000)


def test_stopping_loses_no_request(served: Served) -> None:
    """All requests that were sent before the signal get their responses. It is the last test of the fixture."""
    process, port = served.process, served.port
    body, headers = dumps(BODY), {"Host": "localhost", "Content-Type": "application/json"}
    connections = [HTTPConnection("::1", port, timeout=60) for _ in range(CLIENTS)]
    for connection in connections:
        connection.request("POST", "/v1/classify", body, headers)
    found: Counter[object] = Counter()

    def receive(connection: HTTPConnection) -> None:
        try:
            with closing(connection), connection.getresponse() as response:
                found[response.status] += 1
        except (OSError, HTTPException) as error:
            found[repr(error)] += 1

    threads = [threading.Thread(target=receive, args=[connection]) for connection in connections]
    for thread in threads:
        thread.start()
    while not found:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(90)
    assert found == {200: CLIENTS}
    assert process.wait(60) == 0


def speaks_http(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/-/healthz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
