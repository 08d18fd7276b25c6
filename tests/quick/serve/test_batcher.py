"""Batches, deadlines and admission, without a model and HTTP."""

from __future__ import annotations

import asyncio
import contextvars
import time

import pytest

from serve.admission.batcher import Batcher, Expired, Interrupted
from serve.admission.service_time import ServiceTime

LATER = float("inf")


class Doubler:
    """Doubles the numbers of a batch. A call waits until the test releases `go`, and fails if the batch contains -1."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Semaphore(0)

    async def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        await self.go.acquire()
        if -1 in items:
            raise ValueError("minus one")
        return [2 * item for item in items]


def test_items_queued_behind_a_busy_runner_become_one_batch() -> None:
    async def scenario() -> None:
        run = Doubler()
        batcher = Batcher(run, size=4)
        waiting = [asyncio.create_task(batcher.submit([n], LATER)) for n in range(6)]
        await asyncio.sleep(0.02)
        assert run.batches == [[0, 1, 2, 3]]
        waiting.append(asyncio.create_task(batcher.submit([6, 7, 8], LATER)))
        await asyncio.sleep(0.02)
        run.go.release()
        await asyncio.sleep(0.02)
        assert run.batches[1] == [4, 5, 6, 7], "a submission may be split"
        for _ in range(2):
            run.go.release()
        results = [done.results for done in await asyncio.gather(*waiting)]
        assert results == [[0], [2], [4], [6], [8], [10], [12, 14, 16]]
        assert run.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
        batcher.close()

    asyncio.run(scenario())


@pytest.mark.alone
def test_an_idle_runner_waits_only_for_items_that_are_being_prepared() -> None:
    async def scenario() -> None:
        run = Doubler()
        run.go = asyncio.Semaphore(9)
        coming = 0
        batcher = Batcher(run, size=3, wait=4, coming=lambda: coming)
        start = time.monotonic()
        await asyncio.gather(batcher.submit([1, 2], LATER))
        await batcher.submit([3], LATER)
        assert time.monotonic() - start < 2, "no other item is being prepared"
        coming = 2
        await batcher.submit([4, 5, 6], LATER)
        assert time.monotonic() - start < 2, "a full batch does not wait"
        waiting = [asyncio.create_task(batcher.submit([7], LATER))]
        await asyncio.sleep(0.02)
        assert run.batches == [[1, 2], [3], [4, 5, 6]]
        coming = 0
        waiting.append(asyncio.create_task(batcher.submit([8], LATER)))
        await asyncio.gather(*waiting)
        assert run.batches[3:] == [[7, 8]], "the last prepared item has arrived"
        batcher.close()

    asyncio.run(scenario())


@pytest.mark.alone
def test_the_wait_ends_early_when_no_item_arrives() -> None:
    async def scenario(every: float) -> float:
        run = Doubler()
        run.go = asyncio.Semaphore(99)
        batcher = Batcher(run, size=99, wait=2, coming=lambda: 1)
        start = time.monotonic()
        first = asyncio.create_task(batcher.submit([0], LATER))
        while not first.done():
            await asyncio.wait([first], timeout=every)
            if not first.done():
                asyncio.create_task(batcher.submit([1], LATER))  # noqa: RUF006
        batcher.close()
        return time.monotonic() - start

    assert 0.9 < asyncio.run(scenario(1.6)) < 1.6, "half of the wait, in which no item arrived"
    assert 1.8 < asyncio.run(scenario(0.05)) < 4, "the whole wait, because items kept arriving"


@pytest.mark.alone
def test_a_batch_behind_a_busy_place_stays_open_for_more_items() -> None:
    async def scenario() -> None:
        sizes: list[int] = []
        place = asyncio.Lock()

        async def run(items: list[int]) -> list[int]:
            sizes.append(len(items))
            async with place:
                await asyncio.sleep(0.3)
            return items

        batcher = Batcher(run, size=4, runners=2, places=1)

        async def client(number: int) -> None:
            for _ in range(5):
                await asyncio.sleep(0.01 * number)  # the time in which its image is decoded
                await batcher.submit([number], LATER)

        await asyncio.gather(*(client(number) for number in range(8)))
        # Without open batches the first item would run alone each time, and 40 items would need about 15 batches.
        assert sum(sizes) == 40
        assert len(sizes) <= 12, sizes
        batcher.close()

    asyncio.run(scenario())


def test_an_open_batch_runs_as_soon_as_the_previous_batch_ends() -> None:
    async def scenario() -> None:
        run = Doubler()
        batcher = Batcher(run, size=4, runners=2, places=1)
        first = asyncio.create_task(batcher.submit([1], LATER))
        await asyncio.sleep(1)
        run.go.release()
        await first
        second = asyncio.create_task(batcher.submit([2], LATER))
        await asyncio.sleep(0.02)
        third = asyncio.create_task(batcher.submit([3], LATER))
        await asyncio.sleep(0.02)
        assert run.batches == [[1], [2]], "the batch stays open, because the previous one took long"
        run.go.release()
        await second
        await asyncio.sleep(0.02)
        assert run.batches == [[1], [2], [3]]
        run.go.release()
        await third
        batcher.close()

    asyncio.run(scenario())


def test_free_places_share_the_queued_items() -> None:
    async def scenario(places: int) -> list[list[int]]:
        run = Doubler()
        batcher = Batcher(run, size=8, runners=2 * places, places=places)
        task = asyncio.create_task(batcher.submit(list(range(6)), LATER))
        await asyncio.sleep(0.02)
        for _ in range(4):
            run.go.release()
        assert (await task).results == [0, 2, 4, 6, 8, 10]
        batcher.close()
        return run.batches

    assert asyncio.run(scenario(1)) == [[0, 1, 2, 3, 4, 5]]
    assert asyncio.run(scenario(2)) == [[0, 1, 2], [3, 4, 5]]


def test_free_runners_share_the_queued_items() -> None:
    async def scenario() -> None:
        run = Doubler()
        batcher = Batcher(run, size=8, runners=2)
        task = asyncio.create_task(batcher.submit(list(range(6)), LATER))
        await asyncio.sleep(0.02)
        assert run.batches == [[0, 1, 2], [3, 4, 5]]
        run.go.release()
        run.go.release()
        assert (await task).results == [0, 2, 4, 6, 8, 10]
        batcher.close()

    asyncio.run(scenario())


def test_cancelled_and_expired_items_are_not_run() -> None:
    async def scenario() -> None:
        run = Doubler()
        dropped: list[str] = []
        batcher = Batcher(run, size=1, dropped=dropped.append)
        busy = asyncio.create_task(batcher.submit([0], LATER))
        await asyncio.sleep(0.01)
        gone = asyncio.create_task(batcher.submit([1], LATER))
        late = asyncio.create_task(batcher.submit([2], time.monotonic() + 0.01))
        kept = asyncio.create_task(batcher.submit([3], LATER))
        await asyncio.sleep(0.05)
        gone.cancel()
        run.go.release()
        run.go.release()
        assert (await busy).results == [0]
        assert (await kept).results == [6]
        with pytest.raises(Expired):
            await late
        assert run.batches == [[0], [3]]
        assert dropped == ["cancelled", "expired"]
        batcher.close()

    asyncio.run(scenario())


def test_a_failed_batch_fails_its_submissions_and_no_others() -> None:
    async def scenario() -> None:
        run = Doubler()
        run.go = asyncio.Semaphore(9)
        batcher = Batcher(run, size=2)
        outcomes = await asyncio.gather(
            batcher.submit([1, -1, 5], LATER), batcher.submit([2], LATER), return_exceptions=True
        )
        assert isinstance(outcomes[0], ValueError)
        assert not isinstance(outcomes[1], BaseException)
        assert outcomes[1].results == [4]
        assert [1, -1] in run.batches
        assert all(5 not in batch for batch in run.batches), "the rest of a failed submission is dropped"
        batcher.close()

    asyncio.run(scenario())


def test_keys_take_turns() -> None:
    """A key with many queued items does not delay the items of other keys."""

    async def scenario() -> None:
        run = Doubler()
        batcher = Batcher(run, size=4)
        greedy = asyncio.create_task(batcher.submit(list(range(100, 120)), LATER, "greedy"))
        await asyncio.sleep(0.01)
        assert run.batches == [[100, 101, 102, 103]]
        modest = asyncio.create_task(batcher.submit([1, 2], LATER, "modest"))
        other = asyncio.create_task(batcher.submit([7], LATER, "other"))
        await asyncio.sleep(0.01)
        for _ in range(9):
            run.go.release()
        await asyncio.gather(modest, other)
        assert {1, 2, 7} < {*run.batches[1], *run.batches[2]}
        assert (await greedy).results == [2 * n for n in range(100, 120)]
        batcher.close()

    asyncio.run(scenario())


def test_a_cancelled_call_fails_its_batch_and_keeps_its_runner() -> None:
    """When a client disconnects, Ray Serve cancels the calls made in its request's context. A runner that awaits such a
    call gets a CancelledError."""

    async def scenario() -> None:
        async def cancelled(items: list[int]) -> list[int]:
            if 0 in items:
                raise asyncio.CancelledError
            return items

        batcher = Batcher(cancelled, size=1, runners=2)
        for _ in range(5):
            with pytest.raises(Interrupted):
                await batcher.submit([0], LATER)
        async with asyncio.timeout(60):
            assert (await batcher.submit([1], LATER)).results == [1]
        assert batcher.died == 0
        batcher.close()

    asyncio.run(scenario())


def test_a_runner_that_ends_is_replaced_and_counted() -> None:
    async def scenario() -> None:
        run = Doubler()
        batcher = Batcher(run, size=1)
        held = asyncio.create_task(batcher.submit([1], LATER))
        await asyncio.sleep(0.01)
        for task in batcher._supervisor._tasks:
            task.cancel()
        with pytest.raises(Interrupted):
            await held
        run.go.release()
        run.go.release()
        async with asyncio.timeout(60):
            assert (await batcher.submit([2], LATER)).results == [4]
        assert batcher.died == 1
        batcher.close()

    asyncio.run(scenario())


def test_runners_have_a_context_of_their_own() -> None:
    """Cancelling the request in whose context the batcher was created must not cancel the runners."""
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    async def scenario() -> None:
        async def run(items: list[int]) -> list[int]:
            seen.append(request.get())
            return items

        request.set("the first request")
        batcher = Batcher(run, size=1)
        await batcher.submit([1], LATER)
        batcher.close()

    asyncio.run(scenario())
    assert seen == ["none"]


def test_service_time_is_the_seconds_per_item_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of four items take two seconds, so an item takes 0.5 s. Idle hours and single items change nothing."""
    now = 1000.0
    monkeypatch.setattr("serve.admission.service_time.time.monotonic", lambda: now)
    service_time = ServiceTime()
    for _ in range(10):
        now += 3600
        for items, saturated in ((4, True), (1, False)):
            service_time.begin()
            now += 2
            service_time.end(items, saturated)
    assert service_time.seconds_per_item == pytest.approx(0.5)
    # Two batches at the same time halve the seconds per item.
    for _ in range(30):
        service_time.begin()
        service_time.begin()
        now += 2
        service_time.end(4, saturated=True)
        service_time.end(4, saturated=True)
    assert service_time.seconds_per_item == pytest.approx(0.25, rel=0.1)


def test_service_time_recovers_from_a_slow_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first item takes 18 s. Admission then admits one item at a time, so that no later batch is saturated."""
    now = 1000.0
    monkeypatch.setattr("serve.admission.service_time.time.monotonic", lambda: now)
    service_time = ServiceTime()
    service_time.begin()
    now += 18
    service_time.end(1, saturated=True)
    assert service_time.seconds_per_item == pytest.approx(18)
    for _ in range(500):
        service_time.begin()
        now += 0.01
        service_time.end(1, saturated=False)
    assert service_time.seconds_per_item < 0.1


def test_a_batch_has_at_most_its_share_of_the_size() -> None:
    async def scenario() -> None:
        sizes: list[int] = []
        share = 1.0

        async def run(items: list[int]) -> list[int]:
            sizes.append(len(items))
            return items

        batcher = Batcher(run, size=8, share=lambda: share)
        await batcher.submit(list(range(8)), LATER)
        share = 0.3
        await batcher.submit(list(range(8)), LATER)
        share = 0.0
        await batcher.submit([1, 2], LATER)
        batcher.close()
        assert sizes == [8, 3, 3, 2, 1, 1]

    asyncio.run(scenario())
