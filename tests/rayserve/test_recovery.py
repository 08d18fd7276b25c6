"""How long the endpoint of `sightline serve` takes to stop, and to serve again after a process was killed."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from serve.rayserve import guard
from tests.support.load import Load
from tests.support.served_endpoint import Served, run_command

pytestmark = pytest.mark.alone
SECONDS = 15.0
"""How long the endpoint may take to stop, and to serve again after HAProxy was killed: two idle cores need 3 and 0.5
seconds. Clients that delay it would take a minute, and Ray Serve half a minute to replace HAProxy."""
INGRESS_SECONDS = 30.0
"""How long an ingress may take to be replaced: Ray starts a process, which imports everything, and embeds the label
sets again. Two idle cores need five seconds. A request that waits for an ingress is given up after 45."""
WATCHED_SECONDS = 20.0
"""How long requests are sent at least after a kill."""
CLIENTS = 4


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with run_command("127.0.0.1") as running:
        yield running


def measure_gap(load: Load, pid: int) -> float:
    """Kill a process under load. Returns the longest time in the next seconds in which no request was answered."""
    load.await_success(0)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    load.await_success(killed + WATCHED_SECONDS)
    answered = sorted(when for when, status in load.results if status == 200 and when > killed)
    return max(after - before for before, after in zip([killed, *answered], answered, strict=False))


def test_haproxy_is_replaced_within_seconds(served: Served) -> None:
    pid = guard.find_pid(served.admin_socket())
    assert pid is not None
    with Load(served.url, CLIENTS) as load:
        gap = measure_gap(load, pid)
    assert gap < SECONDS


def test_an_ingress_is_replaced_within_seconds(served: Served) -> None:
    """Only the requests that it held fail, and those that reach it until Ray knows that it is gone. Others wait."""
    ingress = served.find("ServeReplica:sightline:ingress").pid
    with Load(served.url, CLIENTS) as load:
        gap = measure_gap(load, ingress)
    assert gap < INGRESS_SECONDS
    assert len(load.failed(0)) <= 3 * CLIENTS, load.failures  # clients that do not wait fail hundreds of times


def test_idle_clients_do_not_delay_the_stop(served: Served) -> None:
    """It is the last test of the fixture."""
    idle = [socket.create_connection(("127.0.0.1", served.port), timeout=60) for _ in range(100)]
    for connection in idle:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in connection.recv(10_000)
    served.process.send_signal(signal.SIGINT)
    started = time.monotonic()
    served.process.wait(60)
    seconds = time.monotonic() - started
    for connection in idle:
        connection.close()
    assert served.process.returncode == 0
    assert seconds < SECONDS
