"""Batches out of single items, for whatever does better with several at once: the model, a decoder process.

Ray Serve's own `@serve.batch` cuts batches by the clock: while one is being computed, what arrives within each
`batch_wait_timeout_s` becomes another, and these small batches then queue for their turn. Behind a model that takes
longer than that wait, batches stay as small as they were cut. Here a batch is taken from the queue at the moment at
which something can run it, so that whatever has piled up fills it; and what is no longer wanted is left out then.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serve.admission.meter import Meter
from serve.log import log

Item = TypeVar("Item")
Result = TypeVar("Result")


PATIENCE = 0.5
"""The share of the longest wait for more items after which it is over, if none arrived in it."""
HELD, TRAVEL_SECONDS = 0.5, 0.05
"""The share of a batch's time for which the next one, which has to wait for it, is held open for more items, less what
it may take to get there: where batches are quick there is no waiting to be made use of."""


class Expired(Exception):
    """The deadline passed before the work began."""


class Interrupted(Exception):
    """Somebody else cancelled the work."""


@dataclass
class Done(Generic[Result]):
    """The results of a submission, in its order, and what happened to it.

    `waited` are seconds until its last item was taken up, `ran` those that its batches ran, and `batch` is the size of
    the last batch that it was in.
    """

    results: list[Result]
    waited: float = 0.0
    ran: float = 0.0
    batch: int = 0


@dataclass
class _Submission(Generic[Item, Result]):
    future: asyncio.Future[Done[Result]]
    deadline: float
    left: int
    done: Done[Result]
    slots: dict[int, Result] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)


class Batcher(Generic[Item, Result]):
    """Runs items in batches of at most `size`, on at most `runners` at a time.

    `run` gets the items of a batch and returns as many results. When a runner is free and less than a batch is there,
    it waits for up to `wait` seconds, but only while `coming` says that items are on their way, and some do arrive: a
    client who sends one thing after another would wait for nobody. What is there is shared among the `places` that
    batches run in, each with as many runners, if several are free. Items that were queued by one submission may end in
    several batches. Belongs to the event loop that first submits. It has no bound of its own: who submits was admitted.

    A batch that is ready while all places are taken has to wait for one of them, so it is held open for half as long as
    a batch lately took: clients that were answered together ask again together, and the first of them would make a
    small batch of its own.

    Keys take turns, an item each: whoever queued a thousand items is in nobody's way.

    Runners serve all submissions and so are nobody's tasks: they run in a context of their own, because Ray Serve
    cancels the calls that were made in a request's context when that request's client leaves. A runner that ends all
    the same is replaced, and `died` says how many were.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[list[Result]]],
        size: int,
        wait: float = 0.0,
        coming: Callable[[], int] = lambda: 0,
        runners: int = 1,
        places: int | None = None,
        dropped: Callable[[str], None] = lambda why: None,
        meter: Meter | None = None,
    ) -> None:
        self.died = 0
        self._run = run
        self._size = size
        self._wait = wait
        self._coming = coming
        self._runners = runners
        self._places = places or runners
        self._dropped = dropped
        self._meter = meter or Meter()
        self._queues: OrderedDict[str, deque[tuple[_Submission[Item, Result], int, Item]]] = OrderedDict()
        self._queued = 0
        self._arrived = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._busy = 0
        self._turned = 0.0  # when the last batch ended, or began where none ran
        self._took = 0.0

    async def submit(self, items: Sequence[Item], deadline: float, key: str = "") -> Done[Result]:
        """Queue items of `key` and wait for their results. `deadline` is on the clock of `time.monotonic`.

        Cancelling it drops the items that no batch holds yet. Raises `Expired`, or what `run` raised.
        """
        if not items:
            return Done([])
        while len(self._tasks) < self._runners:
            self._start_runner()
        submission: _Submission[Item, Result] = _Submission(
            asyncio.get_running_loop().create_future(), deadline, len(items), Done([])
        )
        self._queues.setdefault(key, deque()).extend((submission, index, item) for index, item in enumerate(items))
        self._queued += len(items)
        self._arrived.set()
        return await submission.future

    def __len__(self) -> int:
        """Items that wait."""
        return self._queued

    def close(self) -> None:
        """Stop the runners. What waits is never answered: submit nothing afterwards."""
        self._closed = True
        for task in self._tasks:
            task.cancel()

    def _start_runner(self) -> None:
        task = asyncio.get_running_loop().create_task(self._work(), context=contextvars.Context())
        task.add_done_callback(self._replace_runner)
        self._tasks.add(task)

    def _replace_runner(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._closed:
            return
        self.died += 1
        log.error("a batch runner ended", exc_info=None if task.cancelled() else task.exception())
        self._start_runner()

    async def _work(self) -> None:
        while True:
            await self._gather()
            batch = self._take()
            if not batch:
                continue
            if not self._busy:
                self._turned = time.monotonic()
            self._busy += 1
            try:
                await self._run_batch(batch)
            finally:
                self._busy -= 1
                now = time.monotonic()
                self._took, self._turned = now - self._turned, now
                self._arrived.set()  # a batch that was held for this one

    async def _gather(self) -> None:
        """Return when a batch is worth taking."""
        while not self._queued:
            self._arrived.clear()
            await self._arrived.wait()
        until = time.monotonic() + self._wait
        while 0 < self._queued < self._size:
            if self._busy >= self._places:
                patience = left = self._turned + HELD * self._took - TRAVEL_SECONDS - time.monotonic()
            else:
                left = until - time.monotonic() if self._coming() else 0.0
                patience = min(left, self._wait * PATIENCE)
            if left <= 0:
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout(patience):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _take(self) -> list[tuple[_Submission[Item, Result], int, Item]]:
        """The next batch: of each key in turn its oldest item, an equal share of all for each place that is free."""
        share = min(self._size, -(-self._queued // max(1, self._places - self._busy)))
        batch: list[tuple[_Submission[Item, Result], int, Item]] = []
        now = time.monotonic()
        while self._queued and len(batch) < share:
            key, queue = next(iter(self._queues.items()))
            entry = queue.popleft()
            self._queued -= 1
            submission = entry[0]
            if submission.future.done():
                # Its client has gone, or another batch of it has failed.
                self._dropped("cancelled" if submission.future.cancelled() else "failed")
            elif now > submission.deadline:
                self._dropped("expired")
                submission.future.set_exception(Expired())
            else:
                batch.append(entry)
                self._queues.move_to_end(key)
            if not queue:
                del self._queues[key]
        return batch

    async def _run_batch(self, batch: list[tuple[_Submission[Item, Result], int, Item]]) -> None:
        start = time.monotonic()
        loaded = self._queued > 0 or len(batch) == self._size
        done = 0
        self._meter.begin()
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
                raise  # this runner itself is to stop, and not only what it called
            return
        finally:
            self._meter.end(done, loaded)
        ran = time.monotonic() - start
        seen: set[int] = set()
        for (submission, index, _), result in zip(batch, results, strict=True):
            submission.slots[index] = result
            submission.left -= 1
            if id(submission) not in seen:
                seen.add(id(submission))
                submission.done.waited = start - submission.since - submission.done.ran
                submission.done.ran += ran
                submission.done.batch = len(batch)
            if not submission.left and not submission.future.done():
                submission.done.results = [submission.slots[number] for number in range(len(submission.slots))]
                submission.future.set_result(submission.done)
