"""`sightline serve` without API keys listens on loopback only, in all the processes that it starts."""

from __future__ import annotations

import signal
import socket
import subprocess
from ipaddress import IPv6Address, ip_address

import httpx
import psutil

from tests.support.endpoint import EXAMPLE
from tests.support.ray_cluster import SIGHTLINE


def is_loopback(host: str) -> bool:
    address = ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def list_listening(process: psutil.Process) -> set[tuple[str, int, str]]:
    """Return host, port and process name of each listening socket. Empty if the process has just ended."""
    try:
        return {
            (connection.laddr.ip, connection.laddr.port, process.name())
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
    except psutil.NoSuchProcess:
        return set()


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
        output = ""
        for line in server.stdout:
            output += line
            if f":{port}" in line:
                break
        assert server.poll() is None, output
        assert httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=30).status_code == 200
        main = psutil.Process(server.pid)
        listening = set().union(*(list_listening(process) for process in [main, *main.children(recursive=True)]))
        assert port in {number for _, number, _ in listening}
        assert {"ray::ServeReplica:sightline:ingress", "ray::ServeReplica:sightline:model"} <= {
            n for _, _, n in listening
        }
        assert not [name for host, _, name in listening if not is_loopback(host)]
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
