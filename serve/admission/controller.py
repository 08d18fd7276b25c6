"""Admission: how much work an ingress holds at once, and who is told to come back later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serve.admission.meter import Meter
from serve.config import EndpointLimits
from serve.http.errors import ApiError

MAX_RETRY_AFTER = 60.0


@dataclass
class Load:
    """So much that is held: requests, images and texts in them, and bytes."""

    requests: int = 0
    images: int = 0
    texts: int = 0
    bytes: int = 0

    @property
    def items(self) -> int:
        """What `limits.in_flight` counts: a request is an item itself, so that empty ones are bounded too."""
        return self.requests + self.images + self.texts

    def grow(self, more: Load, sign: int = 1) -> None:
        """Add another load, or take it away."""
        self.requests += sign * more.requests
        self.images += sign * more.images
        self.texts += sign * more.texts
        self.bytes += sign * more.bytes


@dataclass
class Permit:
    """What one request holds. `deadline` is on the clock of `time.monotonic`; None for a key is nobody in particular,
    who may have all of it."""

    deadline: float
    key: str | None = None
    load: Load = field(default_factory=Load)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


class AdmissionController:
    """Counts requests, images, texts and bytes in flight, and refuses what would be too many or would wait too long.

    How long new work would wait is judged from what an item cost each stage while it worked (`serve.admission.meter`).
    A request whose body is still on its way holds a place and bytes but is no work: slow clients make nobody wait. Keys
    take turns, so that a key waits for its own work and as much of each other's, not for all that there is. When no
    other work is in flight, everything is let in. One key may hold half of what all may hold, so that another finds
    room.
    """

    def __init__(self, limits: EndpointLimits) -> None:
        self._limits = limits
        self.decoding = Meter()
        self.images = Meter()
        self.texts = Meter()
        self.held = Load()
        self._keys: dict[str, Load] = {}

    @contextmanager
    def admit(self, seconds: float, key: str | None = None) -> Iterator[Permit]:
        """Let a request in and take it out at the end. `seconds` are until its deadline.

        Raises `ApiError` (overloaded).
        """
        held = Permit(time.monotonic() + seconds, key)
        self._add(held, Load(requests=1))
        try:
            yield held
        finally:
            self.held.grow(held.load, -1)
            if key is not None:
                self._keys[key].grow(held.load, -1)
                if not self._keys[key].items:
                    del self._keys[key]

    def add(self, held: Permit, images: int = 0, texts: int = 0) -> None:
        """Let work in for a request that was let in. Raises `ApiError`."""
        self._add(held, Load(images=images, texts=texts))

    def add_bytes(self, held: Permit, count: int) -> None:
        """Let in bytes of a body. Raises `ApiError`."""
        limits = self._limits
        if self.held.bytes + count > limits.in_flight_bytes:
            raise self._refuse("too many bytes of requests are in flight")
        own = self._own(held)
        if own.bytes + count > limits.key_bytes() and held.key is not None:
            raise self._refuse("too many bytes of this key's requests are in flight")
        self._grow(held, Load(bytes=count))

    def retry_after(self) -> float:
        """Seconds after which about half of what is in flight will be done."""
        return min(MAX_RETRY_AFTER, max(1.0, self._seconds(self.held) / 2))

    def _add(self, held: Permit, more: Load) -> None:
        limits = self._limits
        if self.held.items + more.items > limits.in_flight:
            raise self._refuse("the queue is full")
        own = self._own(held)
        if held.key is not None and own.items + more.items > limits.key_items():
            raise self._refuse(f"this key has {own.items} images, texts and requests in flight")
        working = Load(0, self.held.images - held.load.images, self.held.texts - held.load.texts)
        if working.items and (wait := self._wait(own, more)) > held.left():
            raise self._refuse(f"the queue is about {wait:.0f} s long, and the deadline is in {held.left():.0f} s")
        self._grow(held, more)

    def _wait(self, own: Load, more: Load) -> float:
        """Seconds until `more` would be done: after all that is held, or after as much of each key as this one has."""
        busy = sum(1 for load in self._keys.values() if load is not own and (load.images or load.texts)) + 1
        in_turn = busy * self._seconds(Load(0, own.images + more.images, own.texts + more.texts))
        everything = self._seconds(Load(0, self.held.images + more.images, self.held.texts + more.texts))
        return min(in_turn, everything) if own is not self.held else everything

    def _seconds(self, load: Load) -> float:
        """What a load costs. Decoders and model work at the same time, each on what the other is done with."""
        decoding = load.images * self.decoding.seconds_per_item
        model = load.images * self.images.seconds_per_item + load.texts * self.texts.seconds_per_item
        return max(decoding, model)

    def _own(self, held: Permit) -> Load:
        """What the request's key holds; of nobody in particular, what all hold."""
        return self.held if held.key is None else self._keys.get(held.key, Load())

    def _grow(self, held: Permit, more: Load) -> None:
        held.load.grow(more)
        self.held.grow(more)
        if held.key is not None:
            self._keys.setdefault(held.key, Load()).grow(more)

    def _refuse(self, why: str) -> ApiError:
        return ApiError("overloaded", f"{why}: try again later", retry_after=self.retry_after())
