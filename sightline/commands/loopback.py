"""Web pages that only this machine can reach: a listening socket, and a server for it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from storage.settings import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI


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


def serve(app: FastAPI, listener: socket.socket, stop: Callable[[], None]) -> None:
    """Serve an app until Ctrl-C. `stop` is called before the server waits for its last requests."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            stop()
            await super().shutdown(sockets)

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    with suppress(KeyboardInterrupt):  # Ctrl-C is the usual way to stop
        Server(config).run(sockets=[listener])
