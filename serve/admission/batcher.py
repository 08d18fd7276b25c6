"""Batches of single items, for stages that are faster with several items at once: the model, a decoder process.

Ray Serve's own `@serve.batch` cuts batches by time: while a batch is computed, the items that arrive within each
`batch_wait_timeout_s` become another batch, and these small batches then queue. If the model takes longer than that
wait, batches stay as small as they were cut. Here a batch is taken from the queue only when something can run it, so
that everything that was queued meanwhile fills it. Items that are no longer wanted are left out at that moment.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serve.admission.service_time import ServiceTime
from serve.supervision import Supervisor

Item = TypeVar("Item")
Result = TypeVar("Result")

IDLE_SHARE = 0.5
"""The wait for more items ends early when no item has arrived for this share of the longest wait."""
HELD_SHARE, TRAVEL_SECONDS = 0.5, 0.05
"""While all places are busy, the next batch stays open for more items for this share of the time that the last batch
took, less the seconds that a batch may need to reach its place. If batches are quicker than that, it does not wait."""


class Expired(Exception):
    """The deadline passed before the work began."""


class Interrupted(Exception):
    """The call that did the work was cancelled, and not by the caller."""


@dataclass
class Done(Generic[Result]):
    """The results of a submission in its order, and its times in seconds.

    `waited` is the time until its last item was taken from the queue, `ran` the time that its batches ran, and `batch`
    the size of the last batch that it was in.
    """

    results: list[Result]
    waited: float = 0.0
    ran: float = 0.0
    batch: int = 0


@dataclass
class _Submission(Generic[Item, Result]):
    future: asyncio.Future[Done[Result]]
    deadline: float
    missing: int
    done: Done[Result]
    begun: Callable[[], None]
    results: dict[int, Result] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)


_Entry = tuple[_Submission[Item, Result], int, Item]
"""A queued item: its submission, its index there, and the item."""


class Batcher(Generic[Item, Result]):
    """Runs queued items in batches of at most `size`, at most `runners` batches at a time.

    `run` gets the items of a batch and returns as many results. Batches run in `places` (replicas, processes), each
    of which has as many runners as the others: one batch runs there while the next is on its way.

    * What fills a batch: everything that is queued, shared among the places that are free. Items of one submission may
      end up in several batches.
    * When a runner is free and less than a full batch is queued, it waits for up to `wait` seconds, but only while
      `coming` says that items are being prepared and some do arrive. A client that sends one request after another
      therefore never waits for others.
    * When all places are busy, the next batch has to wait anyway, so it stays open for half of the time that the last
      batch took. Clients that got their responses together send their next requests together, and the first of those
      would otherwise become a small batch of its own.
    * Keys take turns, one item each: a key that queued a thousand items does not delay other keys.
    * `share` makes batches smaller than `size`, where batches of another kind wait for the same place: a batch has at
      most this share of `size`.
    * Expired and cancelled items are dropped when a batch is taken; `dropped` is called with the reason.

    Runners serve all submissions, so a `serve.supervision.Supervisor` runs them, and replaces one that ends.

    The queue has no limit of its own: callers submit only admitted work. A batcher belongs to the event loop of its
    first submission.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[list[Result]]],
        size: int,
        wait: float = 0.0,
        coming: Callable[[], int] = lambda: 0,
        runners: int = 1,
        places: int | None = None,
        dropped: Callable[[str], None] = lambda reason: None,
        service_time: ServiceTime | None = None,
        share: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self._run = run
        self._size = size
        self._wait = wait
        self._coming = coming
        self._runners = runners
        self._places = places or runners
        self._dropped = dropped
        self._share = share
        self._service_time = service_time or ServiceTime()
        self._queues: OrderedDict[str, deque[_Entry[Item, Result]]] = OrderedDict()  # by key; the first has its turn
        self._queued = 0
        self._changed = asyncio.Event()  # an item was queued, or a batch ended
        self._supervisor = Supervisor()
        self._running = 0
        self._last_turn = 0.0  # when the last batch ended, or when one began while none ran
        self._last_seconds = 0.0  # how long the last batch took

    async def submit(
        self, items: Sequence[Item], deadline: float, key: str = "", begun: Callable[[], None] = lambda: None
    ) -> Done[Result]:
        """Queue items of `key` and wait for their results. `deadline` is on the clock of `time.monotonic`.

        `begun` is called for each item that is taken into a batch.

        If the caller is cancelled, items that are not in a batch yet are dropped. Raises `Expired`, `Interrupted`, or
        what `run` raised.
        """
        if not items:
            return Done([])
        while len(self._supervisor) < self._runners:
            self._supervisor.start("a batch runner", self._work)
        submission: _Submission[Item, Result] = _Submission(
            asyncio.get_running_loop().create_future(), deadline, len(items), Done([]), begun
        )
        self._queues.setdefault(key, deque()).extend((submission, index, item) for index, item in enumerate(items))
        self._queued += len(items)
        self._changed.set()
        return await submission.future

    def __len__(self) -> int:
        """The number of queued items."""
        return self._queued

    @property
    def died(self) -> int:
        """Runners that ended and were replaced."""
        return self._supervisor.died

    def close(self) -> None:
        """Stop the runners. Queued items never get results: submit nothing afterwards."""
        self._supervisor.close()

    async def _work(self) -> None:
        while True:
            await self._wait_for_batch()
            batch = self._take()
            if not batch:
                continue
            if not self._running:
                self._last_turn = time.monotonic()
            self._running += 1
            try:
                await self._run_batch(batch)
            finally:
                self._running -= 1
                now = time.monotonic()
                self._last_seconds, self._last_turn = now - self._last_turn, now
                self._changed.set()  # wakes a runner that holds a batch open until this place is free

    async def _wait_for_batch(self) -> None:
        """Return when a batch should be taken: see the class for the two reasons to wait for more items."""
        while not self._queued:
            self._changed.clear()
            await self._changed.wait()
        until = time.monotonic() + self._wait
        while 0 < self._queued < self._largest():
            if self._running >= self._places:
                held_until = self._last_turn + HELD_SHARE * self._last_seconds - TRAVEL_SECONDS
                timeout = left = held_until - time.monotonic()
            else:
                left = until - time.monotonic() if self._coming() else 0.0
                timeout = min(left, self._wait * IDLE_SHARE)
            if left <= 0:
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._changed.wait()
            except TimeoutError:
                return

    def _largest(self) -> int:
        """The largest size of the next batch."""
        return max(1, math.ceil(self._size * self._share()))

    def _take(self) -> list[_Entry[Item, Result]]:
        """Take the next batch: each key's oldest item in turn, and an equal share of all items for each free place."""
        share = min(self._largest(), -(-self._queued // max(1, self._places - self._running)))
        batch: list[_Entry[Item, Result]] = []
        now = time.monotonic()
        while self._queued and len(batch) < share:
            key, queue = next(iter(self._queues.items()))
            entry = queue.popleft()
            self._queued -= 1
            submission = entry[0]
            if submission.future.done():
                # Its client has disconnected, or another batch of the submission has failed.
                self._dropped("cancelled" if submission.future.cancelled() else "failed")
            elif now > submission.deadline:
                self._dropped("expired")
                submission.future.set_exception(Expired())
            else:
                batch.append(entry)
                submission.begun()
                self._queues.move_to_end(key)
            if not queue:
                del self._queues[key]
        return batch

    async def _run_batch(self, batch: list[_Entry[Item, Result]]) -> None:
        start = time.monotonic()
        saturated = self._queued > 0 or len(batch) == self._size
        done = 0
        self._service_time.begin()
        try:
            results = await self._run([item for _, _, item in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(batch)} items gave {len(results)} results")
            done = len(results)
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            for submission, _, _ in batch:
                if not submission.future.done():
                    submission.future.set_exception(Interrupted("the work was cancelled") if cancelled else error)
            task = asyncio.current_task()
            if not isinstance(error, Exception) and not (cancelled and task and not task.cancelling()):
                raise  # this runner itself is cancelled, and not only the call that it made
            return
        finally:
            self._service_time.end(done, saturated)
        _distribute(batch, results, start, time.monotonic() - start)


def _distribute(batch: list[_Entry[Item, Result]], results: list[Result], start: float, seconds: float) -> None:
    """Give a batch's results to its submissions. The batch began at `start` and ran for `seconds`."""
    seen: set[int] = set()
    for (submission, index, _), result in zip(batch, results, strict=True):
        submission.results[index] = result
        submission.missing -= 1
        if id(submission) not in seen:
            seen.add(id(submission))
            submission.done.waited = start - submission.since - submission.done.ran
            submission.done.ran += seconds
            submission.done.batch = len(batch)
        if not submission.missing and not submission.future.done():
            submission.done.results = [submission.results[number] for number in range(len(submission.results))]
            submission.future.set_result(submission.done)
