"""`sightline serve` behind Ray Serve's HAProxy: who is let in, and how it stops."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from serve.rayserve.internals import ingress_ports
from tests.support.endpoint import EXAMPLE, data_uri, shape_png
from tests.support.ports import free_port
from tests.support.ray_cluster import SIGHTLINE

BODY = {"image": data_uri(shape_png("red circle")), "label_set": "shapes"}


@contextmanager
def serve(host: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, ready. Yields its process and its URL."""
    port = free_port()
    command = [SIGHTLINE, "serve", str(EXAMPLE), "--host", host, "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name not in ingress_ports(port)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: "), line or process.communicate(timeout=60)[1]
        yield process, f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=90)


def test_strangers_forgers_and_dawdlers_and_a_stop_that_loses_nothing() -> None:
    with serve("::1") as (process, url):
        port = int(url.rpartition(":")[2])
        with httpx.Client(base_url=url, headers={"Host": "localhost"}) as client:
            assert client.get("/v1/models").status_code == 200
            # What a client claims of its peer is overwritten, so that nobody can be kept out, or let in, by it.
            assert client.get("/v1/models", headers={"x-sightline-peer": "192.0.2.1"}).status_code == 200
            for forwarded in ("x-forwarded-for", "x-real-ip", "forwarded"):
                answer = client.get("/v1/models", headers={forwarded: "127.0.0.1"})
                assert answer.json()["error"]["code"] == "loopback_only"
            answer = client.get("/v1/models", headers={"Host": "rebound.example"})
            assert answer.json()["error"]["code"] == "loopback_only"
        # An ingress that is asked past HAProxy is told of no peer, and answers nobody.
        first, last = map(int, ingress_ports(port).values())
        direct = [number for number in range(first, min(first + 10, last)) if speaks_http(number)]
        assert direct, "the ingress listens on one of this endpoint's ports"
        for number in direct:
            answer = httpx.get(f"http://127.0.0.1:{number}/v1/models")
            assert answer.json()["error"]["code"] == "loopback_only"
        # Headers that never end hold a connection for a bounded time.
        with socket.create_connection(("::1", port)) as slow:
            slow.settimeout(30)
            slow.sendall(b"GET / HTTP/1.1\r\nHost: ")
            assert b" 408 " in slow.recv(1000)
        found: Counter[object] = Counter()

        def ask() -> None:
            try:
                found[
                    httpx.post(f"{url}/v1/classify", json=BODY, headers={"Host": "localhost"}, timeout=60).status_code
                ] += 1
            except httpx.HTTPError as error:
                found[repr(error)] += 1

        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        while not found:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(90)
        assert found[200] == 40, found
        assert process.wait(60) == 0


def speaks_http(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/-/healthz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
