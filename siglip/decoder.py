"""Decoding in a process of its own, so that a decoder that crashes or hangs costs one image.

Image decoders are C code fed with strangers' bytes. In the caller's process a crash would take the other images of
its task with it, and Ray would replay them into the same crash. Here it ends one child process: the image in hand is
rejected, and a new child takes the next one.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from siglip.config import ImageSpec, Limits
from siglip.images import Decoded, DecodeMode, ImageRejected, decode_image

STARTUP_SECONDS = 60.0
_SOCKET_BYTES = 1 << 20


class Decoder:
    """Decodes images in a child process. Not thread-safe: one per thread.

    The child starts on first use, lives as long as this object or its process does, and is replaced when it dies or
    when an image takes longer than `limits.max_seconds`.
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

    def decode(self, images: Sequence[bytes]) -> list[Decoded | ImageRejected]:
        """Decode images: for each, what `siglip.images.decode_image` gives or raises.

        They are handed over together, because waking a process costs as much as a third of a decode. If the child
        dies or takes too long, they are handed to a new one, one at a time, to find the image that did it.
        """
        try:
            return self._exchange(images)
        except ImageRejected as rejected:
            if len(images) == 1:
                return [rejected]
            return [outcome for image in images for outcome in self.decode([image])]

    def _exchange(self, images: Sequence[bytes]) -> list[Decoded | ImageRejected]:
        """One message each way. Raises `ImageRejected` when no answer came."""
        connection = self._connection or self._start()
        try:
            connection.send_bytes(pickle.dumps(images, protocol=5))
            if not connection.poll(self.limits.max_seconds):
                self.close()
                raise ImageRejected("decoder_timeout", f"over {self.limits.max_seconds:g} s")
            answer: list[Decoded | ImageRejected] = pickle.loads(connection.recv_bytes())
            return answer
        except (EOFError, ConnectionError) as error:
            status = self._child.wait() if self._child else None
            self.close()
            raise ImageRejected("decoder_crashed", f"the decoder's exit status was {status}") from error

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
    """The child's loop: a list of encoded images in, a list of outcomes out, until the parent is gone."""
    spec, limits, mode, thumbnail = pickle.loads(connection.recv_bytes())
    spec, limits = ImageSpec(**spec), Limits(**limits)
    connection.send_bytes(b"ready")
    while True:
        try:
            images = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            return
        outcomes: list[Decoded | ImageRejected] = []
        for data in images:
            try:
                outcomes.append(decode_image(data, spec, limits, mode, thumbnail))
            except ImageRejected as rejected:
                outcomes.append(rejected)
        connection.send_bytes(pickle.dumps(outcomes, protocol=5))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
