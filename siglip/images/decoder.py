"""Decoding in a process of its own, so that a decoder that crashes or hangs costs one image.

Image decoders are C code fed with strangers' bytes. In the caller's process a crash would take the other images of
its task with it, and Ray would replay them into the same crash. Here it ends one child process: the image in hand is
rejected, and a new child takes the next one. The child's memory is bounded by what the largest allowed image needs.

Encoded bytes go to the child through a socket, several images ahead, so that neither waits for the other. Pixels come
back in memory that both share; through the socket come only a few words about each.
"""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
import resource
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip.config import ImageSpec, Limits
from siglip.images.decode import Decoded, DecodeMode, ImageRejected, decode_image

STARTUP_SECONDS = 60.0
SLOTS = 16
"""Images that a child may hold: those that wait for it, and those whose pixels wait to be taken."""
BYTES_PER_PIXEL = 36
"""What an image may take while it is decoded. The dearest known is a WebP with alpha: two canvases of libwebp's, its
copy, and Pillow's image, background, composite and RGB, four bytes each; and one more for a turn."""
_SPARE_BYTES = 128 * 2**20
"""For the libraries that are loaded with the first image of a format, and for small images' fixed costs."""
_SOCKET_BYTES = 1 << 20
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(64 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20)}
"""glibc gives large buffers back to the kernel at once and gets them again zeroed, page by page: half of what a photo
of 12 megapixels costs. So the child keeps what such a photo needs."""
_HEAD = struct.Struct("=Q")


class Decoder:
    """Decodes images in a child process. Not thread-safe: one per thread.

    The child starts on first use if not before, lives as long as this object or its process does, and is replaced when
    it dies or when an image takes longer than `limits.max_seconds`.
    """

    def __init__(
        self, spec: ImageSpec, limits: Limits, mode: DecodeMode = "exact", thumbnail: int | None = None
    ) -> None:
        self.spec = spec
        self.limits = limits
        self.mode: DecodeMode = mode
        self.thumbnail = thumbnail
        self._layout = _Layout(spec.size, thumbnail or 0)
        self._child: subprocess.Popen[bytes] | None = None
        self._starting: socket.socket | None = None
        self._socket: socket.socket | None = None
        self._memory = np.empty(0, np.uint8)
        self._waiting: deque[bytes] = deque()
        self._stuck = False

    def __len__(self) -> int:
        """Images that were submitted and not taken."""
        return len(self._waiting)

    def start(self) -> None:
        """Start the child and do not wait until it is ready, so that several start at the same time."""
        if self._child is not None:
            return
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        self._starting = ours
        file = _anonymous_file(self._layout.bytes)
        self._memory = np.frombuffer(mmap.mmap(file, self._layout.bytes), np.uint8)
        # The child must find this package wherever the parent found it, and must not inherit the parent's signals.
        path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "siglip.images.decoder", str(theirs.fileno()), str(file)],
                pass_fds=[theirs.fileno(), file],
                stdin=subprocess.DEVNULL,
                env={**KEEP_MEMORY, **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                start_new_session=False,
            )
        os.close(file)

    def wait(self) -> None:
        """Start the child if that was not done, and wait until it is ready."""
        if self._socket is None:
            self._connect()

    def submit(self, image: bytes) -> None:
        """Hand an encoded image to the child, behind those before. At most `SLOTS` may be there; see `take`."""
        if len(self._waiting) == SLOTS:
            raise RuntimeError(f"{SLOTS} images are waiting: take one first")
        self._waiting.append(image)
        if self._socket is None:
            self._connect()
        else:
            self._send(self._socket, image)

    def take(self, out: NDArray[np.uint8] | None = None) -> Decoded | ImageRejected:
        """What became of the oldest image: what `siglip.images.decode.decode_image` gives or raises.

        Its pixels are copied into `out`, uint8 (S, S, 3), if that is given, and into an array of their own otherwise.
        When the child dies, or is silent for too long, that is this image's fault, and those after it are handed to a
        new child.
        """
        if not self._waiting:
            raise RuntimeError("no image is waiting")
        outcome = self._receive(out)
        self._waiting.popleft()
        return outcome

    def decode(self, images: Sequence[bytes]) -> list[Decoded | ImageRejected]:
        """Decode images, in their order."""
        outcomes: list[Decoded | ImageRejected] = []
        rest = deque(images)
        while rest or self._waiting:
            while rest and len(self._waiting) < SLOTS:
                self.submit(rest.popleft())
            outcomes.append(self.take())
        return outcomes

    def close(self) -> None:
        """End the child process, and forget what waits."""
        self._end()
        self._waiting.clear()

    def _end(self) -> int | None:
        """End the child process. Returns its exit status, its own if it was ending already."""
        if self._child is None:
            return None
        self._child.kill()
        status = self._child.wait()
        for connection in (self._starting, self._socket):
            if connection is not None:
                connection.close()
        self._child = self._starting = self._socket = None
        self._stuck = False
        return status

    def _receive(self, out: NDArray[np.uint8] | None) -> Decoded | ImageRejected:
        try:
            connection = self._socket or self._connect()
            if not select.select([connection], [], [], 0 if self._stuck else self.limits.max_seconds)[0]:
                self._end()
                return ImageRejected("decoder_timeout", f"over {self.limits.max_seconds:g} s")
            words = pickle.loads(_read_message(connection))
        except (EOFError, ConnectionError):
            return ImageRejected("decoder_crashed", f"the decoder's exit status was {self._end()}")
        if isinstance(words, ImageRejected):
            return words
        slot, width, height, thumbnail_bytes, seconds = words
        pixels, thumbnail = self._layout.slot(self._memory, slot)
        if out is None:
            out = np.empty_like(pixels)
        out[:] = pixels
        return Decoded(out, width, height, bytes(thumbnail[:thumbnail_bytes]) or None, seconds)

    def _send(self, connection: socket.socket, image: bytes) -> None:
        """A child that died of an earlier image, or that reads nothing for so long, is found when that one is taken."""
        try:
            if not self._stuck:
                connection.sendall(_HEAD.pack(len(image)))
                connection.sendall(image)
        except TimeoutError:
            self._stuck = True
        except ConnectionError:
            pass

    def _connect(self) -> socket.socket:
        """The child, ready, with all that waits in its hands; a new one where there is none."""
        self.start()
        connection, self._starting = self._starting, None
        assert connection is not None
        settings = (self.spec.model_dump(), self.limits.model_dump(), self.mode, self.thumbnail)
        self._socket = connection
        connection.settimeout(STARTUP_SECONDS)
        try:
            _write_message(connection, pickle.dumps(settings))
            _read_message(connection)  # an image's clock must not pay for the child's imports
        except (EOFError, OSError):
            self._end()
            raise RuntimeError("the decoder process did not start") from None
        connection.settimeout(self.limits.max_seconds)
        for image in self._waiting:
            self._send(connection, image)
        return connection


class DecoderRing:
    """Several decoders that take images in turn, and give what became of them in the images' order.

    Not thread-safe. `count` may change between two images while none waits: a shard of many images is given more.
    """

    def __init__(
        self, spec: ImageSpec, limits: Limits, mode: DecodeMode = "exact", thumbnail: int | None = None
    ) -> None:
        self._make = partial(Decoder, spec, limits, mode, thumbnail)
        self._decoders = [self._make()]
        self._order: deque[Decoder] = deque()

    def __len__(self) -> int:
        """Images that were submitted and not taken."""
        return len(self._order)

    def resize(self, count: int) -> None:
        """Have so many decoders, started. What waits in them is forgotten."""
        # Not by their order: a task that was interrupted in the midst of an image leaves that one to its decoder alone,
        # and the next shard's first image would be given its pixels.
        if any(len(decoder) for decoder in self._decoders):
            self.close()
        for decoder in self._decoders[count:]:
            decoder.close()
        self._decoders[count:] = [self._make() for _ in range(count - len(self._decoders))]
        for decoder in self._decoders:
            decoder.start()

    def wait(self) -> None:
        """Wait until all are ready."""
        for decoder in self._decoders:
            decoder.wait()

    def submit(self, image: bytes) -> None:
        """Hand an image to the decoder with the fewest; see `Decoder.submit`."""
        decoder = min(self._decoders, key=len)
        decoder.submit(image)
        self._order.append(decoder)

    def take(self, out: NDArray[np.uint8] | None = None) -> Decoded | ImageRejected:
        """What became of the oldest image; see `Decoder.take`."""
        if not self._order:
            raise RuntimeError("no image is waiting")
        return self._order.popleft().take(out)

    def close(self) -> None:
        """End the child processes, and forget what waits."""
        for decoder in self._decoders:
            decoder.close()
        self._order.clear()


class _Layout:
    """Where in the shared memory an image's pixels are, and its thumbnail behind them."""

    def __init__(self, size: int, thumbnail: int) -> None:
        self._shape = (size, size, 3)
        self._pixels = 3 * size**2
        # A JPEG of noise has fewer bytes than its samples, one of a few pixels has its headers.
        self._slot = self._pixels + (3 * thumbnail**2 + 4096 if thumbnail else 0)
        self.bytes = SLOTS * self._slot

    def slot(self, memory: NDArray[np.uint8], number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Views of a slot: its pixels (S, S, 3), and the bytes for a thumbnail."""
        slot = memory[number * self._slot : (number + 1) * self._slot]
        return slot[: self._pixels].reshape(self._shape), slot[self._pixels :]


def _anonymous_file(size: int) -> int:
    """A file without a name, so that nothing is left of it when its processes are gone, however they went."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("pixels")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.truncate(file, size)
    return file


def _write_message(connection: socket.socket, message: bytes) -> None:
    connection.sendall(_HEAD.pack(len(message)) + message)


def _read_message(connection: socket.socket) -> bytearray:
    """The next message. Raises `EOFError` when the other side is gone."""
    (size,) = _HEAD.unpack(_read_bytes(connection, _HEAD.size))
    return _read_bytes(connection, size)


def _read_bytes(connection: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    while done < size:
        count = connection.recv_into(view[done:])
        if not count:
            raise EOFError
        done += count
    return buffer


def _serve(connection: socket.socket, memory: NDArray[np.uint8]) -> None:
    """The child's loop: encoded images in, pixels into slots and words about them out, until its parent is gone."""
    import simplejpeg  # noqa: F401

    import siglip.images.resize  # noqa: F401  # before the clock of the first image starts

    spec, limits, mode, thumbnail = pickle.loads(_read_message(connection))
    spec, limits = ImageSpec(**spec), Limits(**limits)
    layout = _Layout(spec.size, thumbnail or 0)
    _write_message(connection, b"ready")
    for number in itertools.count():
        try:
            data = bytes(_read_message(connection))
            started = time.perf_counter()
            _limit_memory(limits)
            words: Any
            pixels, room = layout.slot(memory, number % SLOTS)
            try:
                decoded = decode_image(data, spec, limits, mode, thumbnail, pixels)
            except ImageRejected as rejected:
                words = rejected
            else:
                small = np.frombuffer(decoded.thumbnail or b"", np.uint8)
                room[: len(small)] = small
                seconds = time.perf_counter() - started
                words = number % SLOTS, decoded.width, decoded.height, len(small), seconds
            _write_message(connection, pickle.dumps(words))
        except (EOFError, ConnectionError):
            return


def _limit_memory(limits: Limits) -> None:
    """Let this process take what the largest allowed image needs beyond what it has, and no more.

    Address space is what is bounded: it does not know how much of that is touched. An image that wants more is
    rejected like one whose bytes are broken, or its decoder dies of it and is replaced.
    """
    try:
        pages = int(os.pread(_memory_file(), 64, 0).split()[0])
    except OSError:  # only Linux has it
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = pages * resource.getpagesize()
    soft = now + _SPARE_BYTES + BYTES_PER_PIXEL * limits.max_pixels + 2 * limits.max_bytes
    resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


@cache
def _memory_file() -> int:
    """What the kernel says of this process's memory: opened once, because it is read for every image."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


if __name__ == "__main__":
    _connection, _file = (int(_argument) for _argument in sys.argv[1:])
    _serve(socket.socket(fileno=_connection), np.frombuffer(mmap.mmap(_file, 0), np.uint8))
