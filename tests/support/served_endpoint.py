"""`sightline serve` in a process of its own, behind HAProxy, as users run it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.rayserve.internals import ingress_ports
from tests.support.endpoint import EXAMPLE
from tests.support.ports import free_port
from tests.support.ray_cluster import SIGHTLINE


@contextmanager
def run_command(host: str, config: Path = EXAMPLE) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run the command until the block ends. Yields its process and its port."""
    port = free_port()
    command = [SIGHTLINE, "serve", str(config), "--host", host, "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name not in ingress_ports(port)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: "), line or process.communicate(timeout=60)[1]
        yield process, port
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=90)
