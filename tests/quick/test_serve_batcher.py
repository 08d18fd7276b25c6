"""Batches, deadlines and admission: no model, no HTTP."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack

import pytest

from serve.batcher import Batcher, Expired
from serve.config import EndpointLimits
from serve.errors import ApiError
from serve.gate import Gate

LATER = float("inf")


class Doubler:
    """Doubles numbers, a batch at a time, each when `go` lets it."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Semaphore(0)

    async def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        await self.go.acquire()
        if -1 in items:
            raise ValueError("minus one")
        return [2 * item for item in items]


def test_what_piles_up_behind_a_busy_runner_becomes_one_batch() -> None:
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


def test_an_idle_runner_waits_a_little_for_more() -> None:
    async def scenario() -> None:
        run = Doubler()
        run.go = asyncio.Semaphore(9)
        batcher = Batcher(run, size=3, wait=0.2)
        start = time.monotonic()
        await batcher.submit([1], LATER)
        await batcher.submit([2], LATER)
        assert time.monotonic() - start < 0.1, "a lone client does not wait"
        await batcher.submit([3, 4, 5], LATER)
        assert time.monotonic() - start < 0.1, "a full batch does not wait"
        first = asyncio.create_task(batcher.submit([6], LATER))
        await asyncio.sleep(0.05)
        assert run.batches == [[1], [2], [3, 4, 5]]
        await asyncio.gather(first, batcher.submit([7], LATER))
        assert run.batches[3:] == [[6, 7]]
        assert time.monotonic() - start > 0.2
        batcher.close()

    asyncio.run(scenario())


def test_free_runners_share_what_waits() -> None:
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


def test_work_that_nobody_waits_for_is_not_run() -> None:
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


def limits(**changes: float) -> EndpointLimits:
    return EndpointLimits.model_validate({"images": 4, "texts": 4, "labels": 4, "in_flight": 20, **changes})


def test_the_gate_counts_items_and_lets_them_out() -> None:
    gate = Gate(limits())
    with gate.admit(10) as first:
        gate.add(first, 18)
        with gate.admit(10) as second:
            with pytest.raises(ApiError, match="the queue is full") as refused:
                gate.add(second, 1)
            assert (refused.value.status_code, refused.value.code) == (429, "overloaded")
            assert int(refused.value.headers_out()["retry-after"]) >= 1
            with pytest.raises(ApiError), gate.admit(10):
                raise AssertionError("one item too many was let in")
        gate.add(first, 1)
    assert (gate.items, gate.bytes) == (0, 0)


def test_the_gate_counts_bytes() -> None:
    gate = Gate(limits(body_bytes=50, in_flight_bytes=100))
    with gate.admit(10) as first, gate.admit(10) as second:
        gate.add_bytes(first, 60)
        with pytest.raises(ApiError, match="too many bytes"):
            gate.add_bytes(second, 60)
        gate.add_bytes(second, 40)
    assert gate.bytes == 0


def test_the_gate_refuses_what_would_wait_past_its_deadline() -> None:
    gate = Gate(limits())
    gate._working = gate._done = 100.0
    assert gate.seconds_per_item == 1.0
    with gate.admit(10) as alone:
        gate.add(alone, 15)  # nothing is ahead of it: the estimate may be wrong, and the work is tried
        with pytest.raises(ApiError, match="17 s long, and the deadline is in 10 s") as refused, gate.admit(10):
            raise AssertionError("let in")
        assert refused.value.retry_after == 8.0
        with gate.admit(30) as patient:
            gate.add(patient, 1)


def test_the_gate_learns_its_rate_from_time_under_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of four that take two seconds each, with idle hours between: half a second an item."""
    now = 1000.0
    monkeypatch.setattr("serve.gate.time.monotonic", lambda: now)
    gate = Gate(limits())
    for _ in range(10):
        now += 3600
        with ExitStack() as stack:
            for _ in range(2):
                gate.add(stack.enter_context(gate.admit(60)), 1)
            now += 2
    assert gate.seconds_per_item == pytest.approx(0.5)
    with gate.admit(9) as first:
        gate.add(first, 15)
        with gate.admit(9), pytest.raises(ApiError, match="about 9 s long"), gate.admit(8):
            raise AssertionError("let in")
