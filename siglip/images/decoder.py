"""Decoding in processes of its own, so that a decoder that crashes or hangs costs one image.

Image decoders are C code that reads untrusted bytes. In the caller's process a crash would end the task with all its
images, and Ray would start the task again and run into the same crash. Here a crash ends one decoder process. Its
current image is tried once more in a new process, because something else may have ended the first one: the kernel's
OOM killer, an operator, what an earlier image left in its memory. If that process dies too, the image is rejected, and
a new decoder takes the next one. The memory of a decoder is bounded by what the largest allowed image needs.

Encoded bytes go to the decoder through a socket, several images ahead, so that neither side waits for the other.
Pixels come back in shared memory. Through the socket come only the checked records of `siglip.images.protocol`.
Decoders are forked by a server process, `siglip.images.decoder_process`, and share the memory of its libraries.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import socket
import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
from numpy.typing import NDArray

from siglip.config import ImageSpec, Limits
from siglip.images.decode import Decoded, DecodeMode, ImageRejected
from siglip.images.decoder_server import SERVER, STARTUP_SECONDS
from siglip.images.patches import fit_grid, read_grids
from siglip.images.protocol import (
    SLOTS,
    DecoderSettings,
    ProtocolError,
    SlotResult,
    read_ready,
    read_result,
    send_message,
)

_SOCKET_BYTES = 1 << 20


class DecoderLost(ImageRejected):
    """An image that was not decoded although nothing is known against it: the server died together with its decoder.

    `reason` is `decoder_crashed`, as for an image whose decoder died twice. A caller that can try again later should.
    """

    def __init__(self, detail: str) -> None:
        super().__init__("decoder_crashed", detail)


class _Died(Exception):
    """The process died. `detail` says how, and is None if the server died too: then the kernel ended the process."""

    def __init__(self, detail: str | None) -> None:
        super().__init__(detail)
        self.detail = detail


class Decoder:
    """Decodes images in a process of its own. Not thread-safe: one thread uses it at a time.

    The process starts on first use if it was not started before. It lives as long as this object or the calling
    process. It is replaced when it dies, when an image takes longer than `limits.max_seconds`, and when it sends
    anything but a valid result.
    """

    def __init__(
        self, spec: ImageSpec, limits: Limits, mode: DecodeMode = "exact", thumbnail: int | None = None
    ) -> None:
        self.limits = limits
        self.pid: int | None = None
        """Process id of the decoder, None while there is none that is ready."""
        self.deaths = 0
        """Processes that died or sent something invalid, while they had images."""
        self._settings = DecoderSettings(spec, limits, mode, thumbnail)
        self._layout = self._settings.layout()
        self._number: int | None = None
        self._starting: socket.socket | None = None
        self._socket: socket.socket | None = None
        self._memory = np.empty(0, np.uint8)
        self._taken = 0
        self._waiting: deque[bytes] = deque()
        self._stuck = False

    def __len__(self) -> int:
        """Number of images that were submitted and not taken."""
        return len(self._waiting)

    def start(self) -> None:
        """Start the process and do not wait until it is ready, so that several start at the same time."""
        if self._number is not None:
            return
        ours, theirs = socket.socketpair()
        with ExitStack() as failing, theirs:
            failing.callback(ours.close)
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            file = _anonymous_file(self._layout.bytes)
            try:
                self._memory = np.frombuffer(mmap.mmap(file, self._layout.bytes), np.uint8)
                self._number = SERVER.start_decoder(self._settings.to_json(), [theirs.fileno(), file])
            finally:
                os.close(file)
            failing.pop_all()
        self._starting = ours
        self._taken = 0

    def wait(self) -> None:
        """Start the process if that was not done, and wait until it is ready."""
        if self._socket is None:
            self._connect()

    def submit(self, image: bytes) -> None:
        """Hand an encoded image to the process, after those submitted before. At most `SLOTS` may wait; see `take`."""
        if len(self._waiting) == SLOTS:
            raise RuntimeError(f"{SLOTS} images are waiting: take one first")
        self._waiting.append(image)
        if self._socket is None:
            self._connect()
        else:
            self._send(self._socket, image)

    def take(self, out: NDArray[np.uint8] | None = None) -> Decoded | ImageRejected:
        """The result of the oldest image: what `siglip.images.decode.decode_image` returns or raises.

        The pixels are copied into `out`, uint8 of the spec's `shape`, if that is given, and into a new array otherwise.
        When the process dies on this image, a new one tries it once more; if that dies too, the image is rejected. When
        the process does not reply within `limits.max_seconds`, the image is rejected. The images after it are handed to
        the new process. Raises `RuntimeError` when no image waits, and when no process can be started.
        """
        if not self._waiting:
            raise RuntimeError("no image is waiting")
        outcome = self._receive(out)
        self._waiting.popleft()
        return outcome

    def decode(self, images: Sequence[bytes]) -> list[Decoded | ImageRejected]:
        """Decode images, any number of them. Results are in the order of the images.

        Raises `OSError` or `RuntimeError` when no process can be started. Then no image of this call waits any more.
        """
        outcomes: list[Decoded | ImageRejected] = []
        rest = deque(images)
        try:
            while rest or self._waiting:
                while rest and len(self._waiting) < SLOTS:
                    self.submit(rest.popleft())
                outcomes.append(self.take())
        except BaseException:
            self._end()
            self._waiting.clear()  # the next call must not get this call's results
            raise
        return outcomes

    def close(self) -> None:
        """End the process, and discard the images that wait. The last decoder that closes also ends the server."""
        self._end()
        self._waiting.clear()
        SERVER.stop_if_unused()

    def _end(self) -> int | None:
        """End the process. Returns its exit status (its own, if it was ending already), None when that is unknown."""
        if self._number is None:
            return None
        status = SERVER.end_decoder(self._number)
        for connection in (self._starting, self._socket):
            if connection is not None:
                connection.close()
        self._number = self.pid = self._starting = self._socket = None
        self._stuck = False
        return status

    def _receive(self, out: NDArray[np.uint8] | None) -> Decoded | ImageRejected:
        """The result of the oldest image, which stays in the queue, from at most two processes."""
        try:
            return self._read(out)
        except _Died as error:
            first = error
        try:
            return self._read(out)
        except _Died as second:
            if first.detail is None or second.detail is None:
                also = "also" if first.detail is None and second.detail is None else "or its decoder"
                return DecoderLost(f"the decoder server died, {also} at the second attempt")
            return ImageRejected("decoder_crashed", second.detail)

    def _read(self, out: NDArray[np.uint8] | None) -> Decoded | ImageRejected:
        """The result of the oldest image. The process is ended unless the result is valid. Raises `_Died`."""
        try:
            connection = self._socket or self._connect()
            slot = self._taken % SLOTS
            seconds = 0.0 if self._stuck else self.limits.max_seconds
            result = read_result(connection, slot, self._settings, self._layout, seconds)
            outcome = result if isinstance(result, ImageRejected) else self._copy(slot, result, out)
        except TimeoutError:
            self._end()
            return ImageRejected("decoder_timeout", f"over {self.limits.max_seconds:g} s")
        except ProtocolError as error:
            self._end()
            self.deaths += 1
            raise _Died(f"the decoder sent {error}") from None
        except (EOFError, ConnectionError):
            status = self._end()
            self.deaths += 1
            raise _Died(None if status is None else f"the decoder's exit status was {status}") from None
        self._taken += 1
        return outcome

    def _copy(self, slot: int, result: SlotResult, out: NDArray[np.uint8] | None) -> Decoded:
        """Copy a decoded image out of the shared memory, which its decoder can still change.

        Raises `ProtocolError` if the grid of an image for a NaFlex model is not the one that follows from the image's
        size, which was checked: it would spoil the embeddings of a whole batch.
        """
        pixels, thumbnail = self._layout.slot(self._memory, slot)
        out = np.empty_like(pixels) if out is None else out
        out[:] = pixels
        patches = self._settings.spec.patches
        if patches is not None:
            grid = fit_grid(result.width, result.height, patches)
            if math.prod(grid) > patches.count or tuple(read_grids(out[None])[0].tolist()) != grid:
                raise ProtocolError(f"another grid than an image of {result.width} x {result.height} has")
        small = bytes(thumbnail[: result.thumbnail_bytes]) or None
        return Decoded(out, result.width, result.height, small, result.seconds)

    def _send(self, connection: socket.socket, image: bytes) -> None:
        """Send an image. A process that died, or reads nothing for too long, is noticed when its image is taken."""
        try:
            if not self._stuck:
                connection.settimeout(self.limits.max_seconds)
                send_message(connection, image)
        except TimeoutError:
            self._stuck = True
        except ConnectionError:
            pass

    def _connect(self, *, again: bool = False) -> socket.socket:
        """Start the process if there is none, wait until it is ready, and send it all images that wait."""
        self.start()
        connection = self._starting
        assert connection is not None
        try:
            self.pid = read_ready(connection, STARTUP_SECONDS)
        except (EOFError, OSError):
            status = self._end()
            if again:
                raise RuntimeError(f"the decoder process did not start (exit status {status})") from None
            return self._connect(again=True)  # the server may have died while it was asked for this decoder
        self._socket, self._starting = connection, None
        for image in self._waiting:
            self._send(connection, image)
        return connection


class DecoderRing:
    """Several decoders that take images in turn, and return the results in the order of the images.

    Not thread-safe. `resize` may change the number of decoders between two shards: a shard of many images gets more.
    """

    def __init__(
        self, spec: ImageSpec, limits: Limits, mode: DecodeMode = "exact", thumbnail: int | None = None
    ) -> None:
        self._make = partial(Decoder, spec, limits, mode, thumbnail)
        self._decoders = [self._make()]
        self._order: deque[Decoder] = deque()

    def __len__(self) -> int:
        """Number of images that were submitted and not taken."""
        return len(self._order)

    def resize(self, count: int) -> None:
        """Have `count` decoders, started. Images that still wait in them are discarded."""
        # Checked in the decoders, not in `_order`: a task that was interrupted while it took an image has removed the
        # image from `_order` only, and the next shard's first image would get its pixels.
        if any(len(decoder) for decoder in self._decoders):
            self.close()
        for decoder in self._decoders[count:]:
            decoder.close()
        self._decoders[count:] = [self._make() for _ in range(count - len(self._decoders))]
        for decoder in self._decoders:
            decoder.start()

    def wait(self) -> None:
        """Wait until all decoders are ready."""
        for decoder in self._decoders:
            decoder.wait()

    def submit(self, image: bytes) -> None:
        """Hand an image to the decoder with the fewest waiting images; see `Decoder.submit`."""
        decoder = min(self._decoders, key=len)
        decoder.submit(image)
        self._order.append(decoder)

    def take(self, out: NDArray[np.uint8] | None = None) -> Decoded | ImageRejected:
        """The result of the oldest image; see `Decoder.take`."""
        if not self._order:
            raise RuntimeError("no image is waiting")
        return self._order.popleft().take(out)

    def close(self) -> None:
        """End the decoder processes, and discard the images that wait."""
        for decoder in self._decoders:
            decoder.close()
        self._order.clear()


def _anonymous_file(size: int) -> int:
    """A file in memory without a name, so that nothing is left of it however its processes end.

    Its size is sealed where the kernel can do that: a hostile decoder that made it shorter would crash its reader.
    """
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(file, size)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return file
    with tempfile.TemporaryFile() as temporary:
        file = os.dup(temporary.fileno())
    os.truncate(file, size)
    return file
