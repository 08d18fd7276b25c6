"""Free TCP ports on loopback for the servers that tests start."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a port that no process listens on. Another process may take it before the caller does."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
