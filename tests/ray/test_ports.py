"""`sightline serve` without keys promises loopback: nothing that it starts listens elsewhere."""

from __future__ import annotations

import signal
import socket
import subprocess
from ipaddress import ip_address

import httpx
import psutil
import pytest

from tests.endpoint import EXAMPLE
from tests.raycluster import SIGHTLINE


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="Ray listens on every interface: ray.init(_node_ip_address=127.0.0.1) is resolved to the machine's address",
)
def test_everything_listens_on_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [SIGHTLINE, "serve", str(EXAMPLE), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert server.stdout
    try:
        said = ""
        for line in server.stdout:
            said += line
            if f":{port}" in line:
                break
        assert server.poll() is None, said
        assert httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=30).status_code == 200
        processes = [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]
        listening = {
            (connection.laddr.ip, connection.laddr.port, process.name())
            for process in processes
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert port in {number for _, number, _ in listening}
        outside = {entry for entry in listening if not ip_address(entry[0]).is_loopback}
        assert not outside
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
