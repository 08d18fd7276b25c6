"""Decoding in a process of its own, so that a decoder that crashes or hangs costs one image.

Image decoders are C code fed with strangers' bytes. In the caller's process a crash would take the other images of
its task with it, and Ray would replay them into the same crash. Here it ends one child process: the image in hand is
rejected, and a new child takes the next one. The child's memory is bounded by what the largest allowed image needs.
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

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

from siglip.config import ImageSpec, Limits
from siglip.images import Decoded, DecodeMode, ImageRejected, decode_image

STARTUP_SECONDS = 60.0
BYTES_PER_PIXEL = 36
"""What an image may take while it is decoded. The dearest known is a WebP with alpha: two canvases of libwebp's, its
copy, and Pillow's image, background, composite and RGB, four bytes each; and one more for a turn."""
_SPARE_BYTES = 128 * 2**20
"""For the libraries that are loaded with the first image of a format, and for small images' fixed costs."""
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

        They are handed over together, because waking a process costs as much as a third of a decode. Outcomes come
        back one by one, so that each image has its own clock; when the child dies or one takes too long, it is known
        which, and those after it are handed to a new child.
        """
        outcomes: list[Decoded | ImageRejected] = []
        while len(outcomes) < len(images):
            try:
                self._exchange(images[len(outcomes) :], outcomes)
            except ImageRejected as rejected:
                outcomes.append(rejected)
        return outcomes

    def _exchange(self, images: Sequence[bytes], outcomes: list[Decoded | ImageRejected]) -> None:
        """Images to the child, and its outcomes onto `outcomes`. Raises `ImageRejected` for the one without."""
        connection = self._connection or self._start()
        try:
            connection.send_bytes(pickle.dumps(images, protocol=5))
            for _ in images:
                if not connection.poll(self.limits.max_seconds):
                    self.close()
                    raise ImageRejected("decoder_timeout", f"over {self.limits.max_seconds:g} s")
                outcomes.append(pickle.loads(connection.recv_bytes()))
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
    """The child's loop: a list of encoded images in, an outcome out for each, until the parent is gone."""
    spec, limits, mode, thumbnail = pickle.loads(connection.recv_bytes())
    spec, limits = ImageSpec(**spec), Limits(**limits)
    connection.send_bytes(b"ready")
    while True:
        try:
            images = pickle.loads(connection.recv_bytes())
            _limit_memory(limits)
            for data in images:
                try:
                    outcome: Decoded | ImageRejected = decode_image(data, spec, limits, mode, thumbnail)
                except ImageRejected as rejected:
                    outcome = rejected
                connection.send_bytes(pickle.dumps(outcome, protocol=5))
            _limit_memory(None)
        except (EOFError, ConnectionError):
            return


def _limit_memory(limits: Limits | None) -> None:
    """Let this process take what the largest allowed image needs beyond what it has, and no more; None is no bound.

    Address space is what is bounded: it does not know how much of that is touched. An image that wants more is
    rejected like one whose bytes are broken, or its decoder dies of it and is replaced.
    """
    statm = Path("/proc/self/statm")
    if resource is None or not statm.exists():
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = hard
    if limits is not None:
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        soft = now + _SPARE_BYTES + BYTES_PER_PIXEL * limits.max_pixels + 2 * limits.max_bytes
        soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
