"""Web pages that only this machine can reach: a listening socket, and a server for it."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from storage.settings import ConfigError

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from curation.review.originals import Originals


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
    server = Server(config)
    with suppress(KeyboardInterrupt), _hang_up(server):  # Ctrl-C is the usual way to stop
        server.run(sockets=[listener])


def leave(originals: Originals) -> None:
    """End the process now if an original is being read: Python would wait for it, and so for a store that is away."""
    if originals.busy:
        sys.stdout.flush()
        os._exit(0)


@contextmanager
def _hang_up(server: uvicorn.Server) -> Iterator[None]:
    """End the server when the terminal is closed, as it ends itself at other signals, and then pass the signal on.

    An exception in the middle of its event loop would not end it.
    """
    previous = signal.getsignal(signal.SIGHUP)
    if previous is signal.SIG_IGN:  # nohup
        yield
        return
    received = []

    def end(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        server.should_exit = True

    signal.signal(signal.SIGHUP, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, previous)
    if received:
        signal.raise_signal(signal.SIGHUP)
