"""The connection to the decoder server: the one process that starts the decoders of this process.

The server is `siglip.images.decoder_process`. It is started with the first decoder, ended with the last one, and
replaced when it dies. It never handles an image, so its replies are trusted.
"""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock

from siglip.images.protocol import END, FORK, REQUEST, STATUS, UNKNOWN_STATUS, read_bytes

STARTUP_SECONDS = 60.0
"""Longest wait for the server's imports, and so for its first reply."""
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(64 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20)}
"""Settings of glibc's malloc for decoders. By default it returns large buffers to the kernel at once, and gets them
back zeroed, page by page: half of the time for a photo of 12 megapixels. With these, a decoder keeps the memory that
such a photo needs."""
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""A process with more threads cannot be forked safely, and each decoder has one core."""


class DecoderServer:
    """Starts and ends decoders through the server process. May be used from several threads.

    A process that was forked from this one has no server yet and starts its own.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._numbers = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._owner = os.getpid()
        self._running: set[int] = set()

    def start_decoder(self, settings: bytes, files: Sequence[int]) -> int:
        """Request a decoder and return its number. Does not wait for the decoder, nor for a server that has to start.

        `settings` are those of `siglip.images.protocol.DecoderSettings`, as JSON. `files` are the descriptors of the
        decoder's end of its socket and of its shared memory. The decoder gets the calling thread's scheduling policy.
        """
        with self._lock:
            number = next(self._numbers)
            policy = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else -1
            request = REQUEST.pack(FORK, number, policy, len(settings)) + settings
            try:
                self._send(request, files)
            except OSError:  # the server died: once more, with a new one
                self._stop()
                self._send(request, files)
            self._running.add(number)
            return number

    def end_decoder(self, number: int) -> int | None:
        """End a decoder, if it has not ended itself, and wait for its end.

        Returns its exit status as `subprocess.Popen.returncode` has it, or None when the server had died: then the
        kernel has ended the decoder, or the decoder ends because its socket is closed.
        """
        with self._lock:
            self._running.discard(number)
            if self._control is None or self._owner != os.getpid():
                return None
            try:
                self._control.sendall(REQUEST.pack(END, number, -1, 0))
                while True:  # a call that was interrupted has left its reply unread
                    found, status = STATUS.unpack(read_bytes(self._control, STATUS.size))
                    if found == number:
                        return None if status == UNKNOWN_STATUS else int(status)
            except (EOFError, OSError):
                self._stop()
                return None

    def stop_if_unused(self) -> None:
        """End the server process if it has no decoders."""
        with self._lock:
            if not self._running:
                self._stop()

    def _send(self, request: bytes, files: Sequence[int]) -> None:
        control = self._connect()
        sent = socket.send_fds(control, [request], list(files))
        control.sendall(request[sent:])

    def _connect(self) -> socket.socket:
        if self._owner != os.getpid():
            self._process = self._control = None  # those of the process that this one was forked from
            self._running.clear()
            self._owner = os.getpid()
        if self._control is None:
            atexit.unregister(self._stop)
            atexit.register(self._stop)
            self._start()
        assert self._control is not None
        return self._control

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(STARTUP_SECONDS)
        # The server must import this package from where this process did. With `-P` the working directory, which may
        # hold a user's own siglip.py, is not on its path.
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "siglip.images.decoder_process", "server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**KEEP_MEMORY, **os.environ, "PYTHONPATH": path, **_ONE_THREAD},
            )
        self._control = ours

    def _stop(self) -> None:
        """End the server process, and with it all its decoders."""
        if self._owner != os.getpid():
            return
        control, self._control = self._control, None
        process, self._process = self._process, None
        if control is not None:
            control.close()
        if process is not None:
            with suppress(OSError):
                process.kill()
            process.wait()


SERVER = DecoderServer()
"""The server of this process's decoders."""
