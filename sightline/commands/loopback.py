"""A listening socket that only this machine can reach."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from storage.settings import ConfigError


@contextmanager
def listen(port: int) -> Iterator[socket.socket]:
    """Listen on 127.0.0.1. Port 0 means any free port. Raises `ConfigError` when the port is in use."""
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror}: choose another, or 0 for a free one") from error
        made.listen(128)
        yield made
