"""Decoding in a process of its own, so that a decoder that crashes or hangs costs one image.

Image decoders are C code fed with strangers' bytes. In the caller's process a crash would take the other images of
its task with it, and Ray would replay them into the same crash. Here it ends one child process: the image in hand is
rejected, a new child takes the next one. The price is handing bytes over a socket: about 0.1 ms an image.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from siglip.config import ImageSpec, Limits
from siglip.images import Decoded, DecodeMode, ImageRejected, decode_image

STARTUP_SECONDS = 60.0
_SOCKET_BYTES = 1 << 20


class Decoder:
    """Decodes images one at a time in a child process. Not thread-safe: one per thread.

    The child starts on first use, lives as long as this object or its process does, and is replaced when it dies
    or when an image takes longer than `limits.max_seconds`.
    """

    def __init__(
        self, spec: ImageSpec, limits: Limits, mode: DecodeMode = "exact", thumbnail: int | None = None
    ) -> None:
        self.spec = spec
        self.limits = limits
        self.mode: DecodeMode = mode
        self.thumbnail = thumbnail
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def decode(self, data: bytes) -> Decoded:
        """Decode one image: see `siglip.images.decode_image`.

        Raises `ImageRejected`, with `decoder_crashed` and `decoder_timeout` among the reasons.
        """
        if not data:
            raise ImageRejected("empty")
        if len(data) > self.limits.max_bytes:
            raise ImageRejected("too_many_bytes", f"{len(data)} bytes, over {self.limits.max_bytes}")
        connection = self._connection or self._start()
        try:
            connection.send_bytes(data)
            if not connection.poll(self.limits.max_seconds):
                self.close()
                raise ImageRejected("decoder_timeout", f"over {self.limits.max_seconds:g} s")
            reply = connection.recv_bytes()
        except (EOFError, ConnectionError) as error:
            status = self._child.wait() if self._child else None
            self.close()
            raise ImageRejected("decoder_crashed", f"the decoder's exit status was {status}") from error
        header, pixels = pickle.loads(reply[4 : 4 + int.from_bytes(reply[:4], "little")]), reply
        if isinstance(header, ImageRejected):
            raise header
        width, height, thumbnail = header
        size = self.spec.size
        flat = np.frombuffer(pixels, np.uint8, count=size * size * 3, offset=len(reply) - size * size * 3)
        return Decoded(flat.reshape(size, size, 3), width, height, thumbnail)

    def close(self) -> None:
        """End the child process. The next `decode` starts another."""
        if self._connection is not None:
            self._connection.close()
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._child = self._connection = None

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        # The child must find this package wherever the parent found it, and must not inherit the parent's signals.
        path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "siglip.decoder", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                start_new_session=False,
            )
        self._connection = connection = Connection(ours.detach())
        settings = (self.spec.model_dump(), self.limits.model_dump(), self.mode, self.thumbnail)
        connection.send_bytes(pickle.dumps(settings))
        # An image's clock must not pay for the child's imports.
        if not connection.poll(STARTUP_SECONDS) or connection.recv_bytes() != b"ready":
            self.close()
            raise RuntimeError("the decoder process did not start")
        return connection


def _serve(connection: Connection) -> None:
    """The child's loop: bytes in, `header length, header, pixels` out, until the parent is gone."""
    spec, limits, mode, thumbnail = pickle.loads(connection.recv_bytes())
    spec, limits = ImageSpec(**spec), Limits(**limits)
    connection.send_bytes(b"ready")
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        try:
            image = decode_image(data, spec, limits, mode, thumbnail)
        except ImageRejected as rejected:
            header = pickle.dumps(rejected)
            connection.send_bytes(len(header).to_bytes(4, "little") + header)
        else:
            header = pickle.dumps((image.width, image.height, image.thumbnail))
            connection.send_bytes(b"".join((len(header).to_bytes(4, "little"), header, image.pixels.tobytes())))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
