"""Admission control: how much work an ingress does at once, which requests wait, and which are refused.

An ingress works on at most `limits.in_flight` items at once, of which one key may hold half. A request that exceeds
this waits in the queue of its key, while requests of other keys overtake it. It is refused with 429 and Retry-After if
it would not be done by its deadline, by the estimated wait. `limits.requests` and `limits.in_flight_bytes` bound what
waits, and one key may hold half of these too.

Refusing late is as bad as not refusing: items are computed first come, first served, so a queue that is longer than the
deadline gives the model only items that are about to expire. `tests/quick/serve/test_overload.py` simulates a model
with 12.3 images/s, a deadline of 30 s and clients that send 24.6 images/s:

    caps only          3.8 responses/s; refused clients waited 30 s for the refusal
    with the estimate  12.2 responses/s; refused clients waited 0 s
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serve.admission.load import Load, Permit
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
class _Waiting:
    permit: Permit
    load: Load
    granted: asyncio.Future[None]


@dataclass
class _Key:
    """What the requests of one key hold, and those of them that wait for capacity, oldest first."""

    held: Load = field(default_factory=Load)
    queued: Load = field(default_factory=Load)
    queue: deque[_Waiting] = field(default_factory=deque)

    def works(self) -> bool:
        """Whether any images or texts are held or queued."""
        return bool(self.held.images or self.held.texts or self.queued.images or self.queued.texts)


class AdmissionController:
    """Counts the work of all requests; lets requests wait for capacity, or refuses them.

    The stages measure their service times in `decoding`, `images` and `texts`. A request whose body is still arriving
    is not work: slow clients do not lengthen the estimated wait. If no other work is in flight, a request is never
    refused for its wait. Not thread-safe: for one event loop.
    """

    def __init__(self, limits: EndpointLimits) -> None:
        self._limits = limits
        self.decoding = ServiceTime()
        self.images = ServiceTime()
        self.texts = ServiceTime()
        self.in_flight = Load()
        self._queued = Load()
        self._keys: OrderedDict[str | None, _Key] = OrderedDict()  # the first has its turn to get capacity

    @contextmanager
    def admit(self, seconds: float, key: str | None = None) -> Iterator[Permit]:
        """Admit a request with a deadline in `seconds`, and release all that it holds at the end.

        Raises `ApiError` (overloaded) if too many requests are in flight, or the queue is too long for the deadline.
        """
        permit = Permit(time.monotonic() + seconds, key)
        own = self._keys.get(key) or _Key()
        if self.in_flight.requests >= self._limits.requests:
            raise self._refuse(f"{self.in_flight.requests} requests are in flight")
        if key is not None and own.held.requests >= self._limits.key_requests():
            raise self._refuse(f"this key has {own.held.requests} requests in flight")
        self.check(permit, Load())
        self._hold(permit, Load(requests=1))
        try:
            yield permit
        finally:
            self.in_flight.grow(permit.load, -1)
            held = self._keys[key].held
            held.grow(permit.load, -1)
            if not held.requests:
                del self._keys[key]
            self._grant()

    def check(self, permit: Permit, more: Load) -> None:
        """Refuse `more` work that would not be done by the deadline. Raises `ApiError` (overloaded)."""
        everything = self.in_flight.images + self.in_flight.texts + self._queued.images + self._queued.texts
        if everything == permit.load.images + permit.load.texts:
            return
        if (wait := self._estimate_wait(permit.key, more)) > USED_DEADLINE * permit.left():
            raise self._refuse(f"the queue is about {wait:.0f} s long, and the deadline is in {permit.left():.0f} s")

    async def reserve(self, permit: Permit, more: Load) -> None:
        """Reserve capacity for all items of an admitted request, and wait for it where necessary.

        Call it once for a request: two requests that hold a part and wait for another part could wait for each other.
        The caller ends the wait at the deadline. Raises `ApiError` (overloaded) like `check`.
        """
        self.check(permit, more)
        own = self._keys[permit.key]
        if not own.queue and self._fits(permit.key, more) and not (own.held.items and self._is_collecting(permit.key)):
            self._hold(permit, more)
            self._keys.move_to_end(permit.key)
            return
        waiting = _Waiting(permit, more, asyncio.get_running_loop().create_future())
        own.queue.append(waiting)
        own.queued.grow(more)
        self._queued.grow(more)
        try:
            await waiting.granted
        except asyncio.CancelledError:
            if waiting in own.queue:
                self._leave_queue(own, waiting)
                self._grant()  # the next one may be smaller
            raise

    def add_bytes(self, permit: Permit, count: int) -> None:
        """Reserve capacity for bytes of an admitted request's body or response. Raises `ApiError` (overloaded)."""
        limits = self._limits
        if self.in_flight.bytes + count > limits.in_flight_bytes:
            raise self._refuse("too many bytes of requests and responses are in flight")
        if permit.key is not None and self._keys[permit.key].held.bytes + count > limits.key_bytes():
            raise self._refuse("too many bytes of this key's requests and responses are in flight")
        self._hold(permit, Load(bytes=count))

    def share_of_texts(self) -> float:
        """The share of the model's time that texts should get: that of the keys with texts among all keys with work.

        Texts and images have batches of their own, which take turns. Without this, a key that sends only texts would
        get half of the model's time, however many other keys send images.
        """
        texts = sum(1 for state in self._keys.values() if state.held.texts)
        images = sum(1 for state in self._keys.values() if state.held.images)
        return texts / (texts + images) if texts else 1.0

    def retry_after(self) -> float:
        """Seconds after which about half of the work in flight will be done, from 1 to `MAX_RETRY_AFTER`."""
        everything = self._seconds(self.in_flight) + self._seconds(self._queued)
        return min(MAX_RETRY_AFTER, max(1.0, everything / 2))

    def _fits(self, key: str | None, more: Load) -> bool:
        """Whether `more` is within the capacity, and within a key's share of it."""
        free = self.in_flight.items + more.items <= self._limits.in_flight or not self.in_flight.items
        return free and self._in_share(key, more)

    def _in_share(self, key: str | None, more: Load) -> bool:
        """Whether `more` is within a key's share. A key without work may always have some."""
        own = self._keys[key].held.items
        return key is None or own + more.items <= self._limits.key_items() or not own

    def _is_collecting(self, key: str | None) -> bool:
        """Whether capacity is collected for a request of another key, so that `key` waits if it has work already."""
        return any(
            state.queue and self._in_share(other, state.queue[0].load)
            for other, state in self._keys.items()
            if other != key
        )

    def _grant(self) -> None:
        """Give free capacity to queued requests: keys take turns, and the oldest request of a key comes first.

        While the first request of a key needs more than is free, only keys without any work may overtake it: otherwise
        keys that send small requests all the time would never leave enough.
        """
        waiting = [key for key, state in self._keys.items() if state.queue]
        collecting = False
        while waiting:
            key = waiting.pop(0)
            own = self._keys[key]
            first = own.queue[0]
            if first.granted.done():  # its request was cancelled, and has not run since
                self._leave_queue(own, first)
                if own.queue:
                    waiting.insert(0, key)
                continue
            if not self._fits(key, first.load):
                # It is this key's turn: capacity is collected for its request.
                collecting = collecting or self._in_share(key, first.load)
                continue
            if collecting and own.held.items:
                continue
            self._leave_queue(own, first)
            self._hold(first.permit, first.load)
            first.granted.set_result(None)
            self._keys.move_to_end(key)
            if own.queue:
                waiting.append(key)

    def _leave_queue(self, own: _Key, waiting: _Waiting) -> None:
        own.queue.remove(waiting)
        own.queued.grow(waiting.load, -1)
        self._queued.grow(waiting.load, -1)

    def _estimate_wait(self, key: str | None, more: Load) -> float:
        """Seconds until `more` would be done.

        Keys take turns in the queues, so a key waits for its own work and for as much of each other key with work, but
        never for more than all work.
        """
        everything = Load(
            images=self.in_flight.images + self._queued.images + more.images,
            texts=self.in_flight.texts + self._queued.texts + more.texts,
        )
        if key is None:
            return self._seconds(everything)
        own = self._keys.get(key) or _Key()
        others = sum(1 for state in self._keys.values() if state is not own and state.works())
        alone = Load(
            images=own.held.images + own.queued.images + more.images,
            texts=own.held.texts + own.queued.texts + more.texts,
        )
        return min((others + 1) * self._seconds(alone), self._seconds(everything))

    def _seconds(self, load: Load) -> float:
        """Seconds that a load takes. Decoders and model work at the same time, so the slower of the two counts."""
        decoding = load.images * self.decoding.seconds_per_item
        model = load.images * self.images.seconds_per_item + load.texts * self.texts.seconds_per_item
        return max(decoding, model)

    def _hold(self, permit: Permit, more: Load) -> None:
        permit.load.grow(more)
        self.in_flight.grow(more)
        if permit.key not in self._keys:
            self._keys[permit.key] = _Key()
            self._keys.move_to_end(permit.key, last=False)  # it had no work until now, so its turn is next
        self._keys[permit.key].held.grow(more)

    def _refuse(self, reason: str) -> ApiError:
        return ApiError("overloaded", f"{reason}: try again later", retry_after=self.retry_after())
