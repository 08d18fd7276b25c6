"""Binary layout of the messages between a process that needs images decoded and its decoder processes.

A decoder runs C code on untrusted bytes, so a hostile image may take it over. Its messages are therefore fixed
records of numbers plus a bounded text. Nothing in them is unpickled or evaluated, every field is checked, and a
record that does not fit raises `ProtocolError`. Messages in the other direction, and those of the decoder server, come
from trusted processes.

Lengths and numbers have the machine's byte order, because both sides run on the same machine.
"""

from __future__ import annotations

import json
import math
import socket
import time
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from siglip.config import ImageSpec, Limits
from siglip.images.decode import DecodeMode, ImageRejected

SLOTS = 16
"""Images that one decoder may hold: those not yet decoded, and those whose pixels were not yet taken."""
DETAIL_BYTES = 1000
"""Longest detail text of a rejected image, in bytes of UTF-8. Longer texts are cut off."""
DECODE_REASONS = (
    "empty",
    "too_many_bytes",
    "too_many_pixels",
    "not_an_image",
    "unsupported",
    "truncated",
    "corrupt",
    "out_of_memory",
)
"""Reasons that `siglip.images.decode.decode_image` gives. A decoder sends the index into this tuple."""

FORK, END = 1, 2
REQUEST = Struct("=BQiI")
"""A request to the server: FORK or END; the decoder's number; its scheduling policy; bytes of settings that follow.
FORK carries two descriptors: the decoder's socket and its shared memory."""
STATUS = Struct("=Qi")
"""The server's reply to END: the decoder's number, and its exit status as `subprocess.Popen.returncode` has it."""
UNKNOWN_STATUS = -(2**31)
"""The status of a decoder that this server did not start: an earlier server did, and died."""

_LENGTH = Struct("=Q")
_READY = Struct("=I")
_RESULT = Struct("=BHIIIHd")
"""0 or 1 + index of the reason; slot; width; height; bytes of the thumbnail; bytes of the detail text; seconds."""


class ProtocolError(Exception):
    """A message that does not have the documented layout. The process that sent it must be ended."""


class SlotResult(NamedTuple):
    """A decoded image whose pixels are in the shared memory: see `siglip.images.decode.Decoded`."""

    width: int
    height: int
    thumbnail_bytes: int
    seconds: float


@dataclass(frozen=True)
class DecoderSettings:
    """What a decoder does with every image: the arguments of `siglip.images.decode.decode_image`."""

    spec: ImageSpec
    limits: Limits
    mode: DecodeMode = "exact"
    thumbnail: int | None = None

    def to_json(self) -> bytes:
        """The settings as JSON in UTF-8."""
        fields = {"mode": self.mode, "thumbnail": self.thumbnail}
        return json.dumps({"spec": self.spec.model_dump(), "limits": self.limits.model_dump(), **fields}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> DecoderSettings:
        """The settings that `to_json` wrote."""
        fields = json.loads(text)
        return cls(
            ImageSpec(**fields["spec"]), Limits(**fields["limits"]), mode=fields["mode"], thumbnail=fields["thumbnail"]
        )

    def layout(self) -> SlotLayout:
        """The layout of the shared memory for these settings."""
        return SlotLayout(self.spec.shape, self.thumbnail or 0)


class SlotLayout:
    """Layout of the shared memory: `SLOTS` slots, each with an image's pixels and then its thumbnail's JPEG.

    `bytes` is the size of the whole memory, `thumbnail_bytes` the size of one slot's room for a thumbnail.
    """

    def __init__(self, shape: tuple[int, ...], thumbnail: int) -> None:
        self._shape = shape
        self._pixels = math.prod(shape)
        # A JPEG of noise has fewer bytes than its samples. The 4096 are for the headers of a JPEG of a few pixels.
        self.thumbnail_bytes = 3 * thumbnail**2 + 4096 if thumbnail else 0
        self._slot = self._pixels + self.thumbnail_bytes
        self.bytes = SLOTS * self._slot

    def slot(self, memory: NDArray[np.uint8], number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Views of a slot: its pixels, uint8 of the spec's shape, and the room for a thumbnail's bytes, uint8 (n,)."""
        slot = memory[number * self._slot : (number + 1) * self._slot]
        return slot[: self._pixels].reshape(self._shape), slot[self._pixels :]


def send_message(connection: socket.socket, message: bytes) -> None:
    """Send bytes with their length before them."""
    connection.sendall(_LENGTH.pack(len(message)))
    connection.sendall(message)


def read_message(connection: socket.socket) -> bytearray:
    """The next message of a trusted sender. Raises `EOFError` when the sender is gone."""
    (size,) = _LENGTH.unpack(read_bytes(connection, _LENGTH.size))
    return read_bytes(connection, size)


def send_ready(connection: socket.socket, pid: int) -> None:
    """Say that the decoder `pid` has loaded its libraries and waits for images."""
    connection.sendall(_READY.pack(pid))


def read_ready(connection: socket.socket, seconds: float) -> int:
    """Wait until a decoder is ready, and return its process id. Raises `EOFError` or `TimeoutError`."""
    (pid,) = _READY.unpack(read_bytes(connection, _READY.size, time.monotonic() + seconds))
    return int(pid)


def send_result(connection: socket.socket, slot: int, result: SlotResult) -> None:
    """Say that a slot of the shared memory holds a decoded image."""
    width, height, thumbnail_bytes, seconds = result
    connection.sendall(_RESULT.pack(0, slot, width, height, thumbnail_bytes, 0, seconds))


def send_rejection(connection: socket.socket, slot: int, rejected: ImageRejected) -> None:
    """Say that the image for a slot was rejected."""
    detail = rejected.detail.encode("utf-8", "replace")[:DETAIL_BYTES]
    code = 1 + DECODE_REASONS.index(rejected.reason)
    connection.sendall(_RESULT.pack(code, slot, 0, 0, 0, len(detail), 0.0) + detail)


def read_result(
    connection: socket.socket, slot: int, settings: DecoderSettings, layout: SlotLayout, seconds: float
) -> SlotResult | ImageRejected:
    """A decoder's result for the image in `slot`, checked in every field. The whole message must come in `seconds`.

    Raises `ProtocolError` for a message that does not fit the layout, `EOFError` when the decoder is gone, and
    `TimeoutError` when the message is not complete in time.
    """
    deadline = time.monotonic() + seconds
    code, number, width, height, thumbnail_bytes, detail_bytes, took = _RESULT.unpack(
        read_bytes(connection, _RESULT.size, deadline)
    )
    if code > len(DECODE_REASONS) or number != slot or detail_bytes > DETAIL_BYTES:
        raise ProtocolError(f"a result of kind {code} for slot {number} (expected {slot}), detail {detail_bytes} bytes")
    if code:
        detail = read_bytes(connection, detail_bytes, deadline).decode("utf-8", "replace")
        return ImageRejected(DECODE_REASONS[code - 1], detail)
    if not (0 < width * height <= settings.limits.max_pixels) or thumbnail_bytes > layout.thumbnail_bytes:
        raise ProtocolError(f"a result of {width} x {height} pixels with a thumbnail of {thumbnail_bytes} bytes")
    if detail_bytes or not math.isfinite(took) or took < 0:
        raise ProtocolError(f"a decoded image with {took} seconds and a detail of {detail_bytes} bytes")
    return SlotResult(width, height, thumbnail_bytes, took)


def read_bytes(connection: socket.socket, size: int, deadline: float | None = None) -> bytearray:
    """Exactly `size` bytes. `deadline` is a time of `time.monotonic`; without it, the socket's own timeout counts.

    Bytes that have already arrived are returned even when the deadline has passed. Raises `EOFError` when the sender
    is gone, and `TimeoutError` when the bytes are not complete at the deadline.
    """
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    while done < size:
        if deadline is not None:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
        count = connection.recv_into(view[done:])
        if not count:
            raise EOFError
        done += count
    return buffer
