"""Admission control: how much work an ingress holds at once, and which requests are refused.

Two rules refuse a request with 429 and Retry-After:

* Caps: `limits.in_flight` items and `limits.in_flight_bytes` bytes, of which one key may hold half.
* The estimated wait: a request is refused at once if its work would not be done by its deadline.

Caps alone are not enough. Items are computed first come, first served, so under overload a queue that is longer than
the deadline gives the model only items that are about to expire. `tests/quick/serve/test_overload.py` simulates a model
with 12.3 images/s, a deadline of 30 s and clients that send 24.6 images/s:

    caps only          3.8 responses/s; refused clients waited 30 s for the refusal
    with the estimate  12.2 responses/s; refused clients waited 0 s

If `limits.in_flight` makes the queue shorter than the deadline, caps are enough. But the right number depends on the
model's speed, which the configuration does not know.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serve.admission.service_time import ServiceTime
from serve.config import EndpointLimits
from serve.http.errors import ApiError

MAX_RETRY_AFTER = 60.0
"""The largest Retry-After, in seconds."""
USED_DEADLINE = 0.8
"""The share of the time until its deadline that a request may be expected to wait. The rest is a margin for errors of
the estimate: without a margin the simulation has 10.9 responses/s instead of 12.2. With two keys, of which one sends
ten times the capacity, that key has 1.8 responses/s instead of 11.3."""


@dataclass
class Load:
    """An amount of work: requests, the images and texts in them, and the bytes of their bodies."""

    requests: int = 0
    images: int = 0
    texts: int = 0
    bytes: int = 0

    @property
    def items(self) -> int:
        """What `limits.in_flight` counts. A request counts as an item too, so that empty requests are limited."""
        return self.requests + self.images + self.texts

    def grow(self, more: Load, sign: int = 1) -> None:
        """Add another load, or subtract it with `sign` -1."""
        self.requests += sign * more.requests
        self.images += sign * more.images
        self.texts += sign * more.texts
        self.bytes += sign * more.bytes


@dataclass
class Permit:
    """One admitted request: its deadline on the clock of `time.monotonic`, its key, and the load that it holds.

    A request without a key (None) is not limited to a key's half.
    """

    deadline: float
    key: str | None = None
    load: Load = field(default_factory=Load)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


class AdmissionController:
    """Counts requests, images, texts and bytes in flight; refuses what exceeds a cap or would miss its deadline.

    The stages measure their service times in `decoding`, `images` and `texts`. A request whose body is still arriving
    counts against the caps, but it is not work: slow clients do not lengthen the estimated wait. If no other work is in
    flight, a request is never refused for its wait. Not thread-safe: for one event loop.
    """

    def __init__(self, limits: EndpointLimits) -> None:
        self._limits = limits
        self.decoding = ServiceTime()
        self.images = ServiceTime()
        self.texts = ServiceTime()
        self.in_flight = Load()
        self._keys: dict[str, Load] = {}

    @contextmanager
    def admit(self, seconds: float, key: str | None = None) -> Iterator[Permit]:
        """Admit a request with a deadline in `seconds`, and release all that it holds at the end.

        Raises `ApiError` (overloaded).
        """
        permit = Permit(time.monotonic() + seconds, key)
        self._reserve(permit, Load(requests=1))
        try:
            yield permit
        finally:
            self.in_flight.grow(permit.load, -1)
            if key is not None:
                self._keys[key].grow(permit.load, -1)
                if not self._keys[key].items:
                    del self._keys[key]

    def add(self, permit: Permit, images: int = 0, texts: int = 0) -> None:
        """Reserve capacity for an admitted request's images and texts. Raises `ApiError` (overloaded)."""
        self._reserve(permit, Load(images=images, texts=texts))

    def add_bytes(self, permit: Permit, count: int) -> None:
        """Reserve capacity for bytes of an admitted request's body. Raises `ApiError` (overloaded)."""
        limits = self._limits
        if self.in_flight.bytes + count > limits.in_flight_bytes:
            raise self._refuse("too many bytes of requests are in flight")
        own = self._load_of_key(permit)
        if own.bytes + count > limits.key_bytes() and permit.key is not None:
            raise self._refuse("too many bytes of this key's requests are in flight")
        self._hold(permit, Load(bytes=count))

    def retry_after(self) -> float:
        """Seconds after which about half of the work in flight will be done, from 1 to `MAX_RETRY_AFTER`."""
        return min(MAX_RETRY_AFTER, max(1.0, self._seconds(self.in_flight) / 2))

    def _reserve(self, permit: Permit, more: Load) -> None:
        limits = self._limits
        if self.in_flight.items + more.items > limits.in_flight:
            raise self._refuse("the queue is full")
        own = self._load_of_key(permit)
        if permit.key is not None and own.items + more.items > limits.key_items():
            raise self._refuse(f"this key has {own.items} images, texts and requests in flight")
        others = self.in_flight.images + self.in_flight.texts - permit.load.images - permit.load.texts
        if others and (wait := self._estimate_wait(own, more)) > USED_DEADLINE * permit.left():
            raise self._refuse(f"the queue is about {wait:.0f} s long, and the deadline is in {permit.left():.0f} s")
        self._hold(permit, more)

    def _estimate_wait(self, own: Load, more: Load) -> float:
        """Seconds until `more` would be done, where `own` is the load of its key.

        Keys take turns in the queues, so a key waits for its own work and for as much of each other key with work in
        flight, but never for more than everything that is in flight.
        """
        everything = self._seconds(Load(0, self.in_flight.images + more.images, self.in_flight.texts + more.texts))
        if own is self.in_flight:
            return everything
        keys = sum(1 for load in self._keys.values() if load is not own and (load.images or load.texts)) + 1
        in_turn = keys * self._seconds(Load(0, own.images + more.images, own.texts + more.texts))
        return min(in_turn, everything)

    def _seconds(self, load: Load) -> float:
        """Seconds that a load takes. Decoders and model work at the same time, so the slower of the two counts."""
        decoding = load.images * self.decoding.seconds_per_item
        model = load.images * self.images.seconds_per_item + load.texts * self.texts.seconds_per_item
        return max(decoding, model)

    def _load_of_key(self, permit: Permit) -> Load:
        """What the requests of the permit's key hold; without a key, what all requests hold."""
        return self.in_flight if permit.key is None else self._keys.get(permit.key, Load())

    def _hold(self, permit: Permit, more: Load) -> None:
        permit.load.grow(more)
        self.in_flight.grow(more)
        if permit.key is not None:
            self._keys.setdefault(permit.key, Load()).grow(more)

    def _refuse(self, reason: str) -> ApiError:
        return ApiError("overloaded", f"{reason}: try again later", retry_after=self.retry_after())
