"""`sightline serve` in a process of its own, as users run it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from serve.rayserve.internals import ENABLE_HAPROXY, fallback_port, ingress_ports
from tests.support.endpoint import EXAMPLE
from tests.support.ports import free_port
from tests.support.ray_cluster import SIGHTLINE


class Served:
    """The running command: its process, its port and its URL."""

    def __init__(self, process: subprocess.Popen[str], host: str, port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://{host}:{port}"

    def find(self, program: str) -> psutil.Process:
        """Return the first process below the command whose program, or actor, has `program` in its name."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if program in "".join(child.cmdline()[:1]))

    def admin_socket(self) -> Path:
        """The path of HAProxy's admin socket."""
        arguments = self.find("bin/haproxy").cmdline()
        return Path(arguments[arguments.index("-f") + 1]).with_name("admin.sock")


@contextmanager
def run_command(host: str, config: Path = EXAMPLE, haproxy: bool = True) -> Iterator[Served]:
    """Run the command until the block ends. It is ready for requests when the block begins."""
    port = free_port()
    command = [SIGHTLINE, "serve", str(config), "--host", host, "--port", str(port)]
    own_ports = ingress_ports(port) | fallback_port(port)  # the command chooses them, as it does for a user
    environment = {name: value for name, value in os.environ.items() if name not in own_ports}
    environment[ENABLE_HAPROXY] = str(int(haproxy))
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: "), line or process.communicate(timeout=60)[1]
        yield Served(process, f"[{host}]" if ":" in host else host, port)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=90)
