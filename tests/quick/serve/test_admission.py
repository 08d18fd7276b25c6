"""Admission control: capacity, keys' shares, waiting, deadlines and the estimated wait."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import ExitStack
from typing import Any

import pytest

from serve.admission.controller import AdmissionController
from serve.admission.load import PAIRS_PER_ITEM, Load, Permit
from serve.admission.service_time import ServiceTime
from serve.config import EndpointLimits
from serve.http.errors import ApiError


def limits(**changes: float) -> EndpointLimits:
    small = {"images": 4, "texts": 4, "labels": 4, "pairs": 4, "in_flight": 20}
    return EndpointLimits.model_validate({**small, **changes})


def measured(seconds_per_item: float) -> ServiceTime:
    service_time = ServiceTime()
    service_time._batches.append((seconds_per_item, 1))
    return service_time


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a scenario, which fails if it takes a minute."""
    asyncio.run(asyncio.wait_for(main, 60))


async def let_others_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_capacity_is_reserved_and_released() -> None:
    async def scenario() -> None:
        controller = AdmissionController(limits())
        with controller.admit(10) as first:
            await controller.reserve(first, Load(images=10, texts=8, pairs=2 * PAIRS_PER_ITEM))
            assert controller.in_flight.items == 20
        assert controller.in_flight == Load()
        assert not controller._keys

    run(scenario())


def test_what_exceeds_the_capacity_waits_for_it_and_is_granted_in_order() -> None:
    async def scenario() -> None:
        controller = AdmissionController(limits())
        order: list[int] = []
        ended = asyncio.Event()

        async def request(number: int, texts: int) -> None:
            with controller.admit(10) as permit:
                await controller.reserve(permit, Load(texts=texts))
                order.append(number)
                await ended.wait()

        async with asyncio.TaskGroup() as group:
            for number, texts in enumerate((15, 5, 15, 1)):
                group.create_task(request(number, texts))
                await let_others_run()
            assert order == [0, 1], "the third does not fit, and the fourth must not overtake it"
            assert controller.in_flight.items == 20
            ended.set()
        assert order == [0, 1, 2, 3]
        assert controller.in_flight == Load() == controller._queued

    run(scenario())


def test_a_key_that_exceeds_its_share_waits_while_other_keys_are_served() -> None:
    async def scenario() -> None:
        controller = AdmissionController(limits())
        with controller.admit(10, "greedy") as second:
            with ExitStack() as stack:
                first = stack.enter_context(controller.admit(10, "greedy"))
                await controller.reserve(first, Load(images=8))
                waiting = asyncio.create_task(controller.reserve(second, Load(images=4)))
                await let_others_run()
                assert not waiting.done(), "it would hold 12 of 20"
                with controller.admit(10, "modest") as other:
                    await controller.reserve(other, Load(images=10))
                    assert not waiting.done()
                await let_others_run()
                assert not waiting.done(), "the share is the greedy key's own"
            await waiting
        assert controller.in_flight == Load()

    run(scenario())


def test_keys_take_turns_when_capacity_becomes_free() -> None:
    async def scenario() -> None:
        controller = AdmissionController(limits())
        granted: list[str] = []

        async def request(key: str) -> None:
            with controller.admit(10, key) as permit:
                await controller.reserve(permit, Load(images=10))
                granted.append(key)
                await let_others_run()

        async with asyncio.TaskGroup() as group:
            with controller.admit(10) as everything:
                await controller.reserve(everything, Load(images=20))
                for key in ("a", "a", "a", "b", "b", "b", "c", "c", "c"):
                    group.create_task(request(key))
                await let_others_run()
                assert not granted
        assert sorted(granted[:3]) == sorted(granted[3:6]) == sorted(granted[6:]) == ["a", "b", "c"]

    run(scenario())


def test_a_waiting_request_that_ends_leaves_the_queue_to_the_next() -> None:
    async def scenario() -> None:
        controller = AdmissionController(limits())
        with controller.admit(10) as first:
            await controller.reserve(first, Load(images=18))

            async def request(images: int) -> None:
                with controller.admit(10) as permit:
                    await controller.reserve(permit, Load(images=images))

            large, small = (asyncio.create_task(request(images)) for images in (4, 1))
            await let_others_run()
            assert not small.done(), "it is behind the large one"
            large.cancel()
            await small
            assert controller._queued == Load()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await request(4)
            assert controller._queued == Load()
        assert controller.in_flight == Load()

    run(scenario())


def test_too_many_requests_or_bytes_are_refused() -> None:
    controller = AdmissionController(limits(body_bytes=50, response_bytes=1, in_flight_bytes=100, requests=4))
    with controller.admit(10) as first, controller.admit(10) as second:
        controller.add_bytes(first, 60)
        with pytest.raises(ApiError, match="too many bytes") as refused:
            controller.add_bytes(second, 60)
        assert (refused.value.status_code, refused.value.code) == (429, "overloaded")
        assert int(refused.value.headers_out()["retry-after"]) >= 1
        controller.add_bytes(second, 40)
        with controller.admit(10), controller.admit(10), pytest.raises(ApiError, match="4 requests are in flight"):
            controller.admit(10).__enter__()
    assert controller.in_flight == Load()


def test_one_key_may_hold_half_of_the_requests_and_bytes() -> None:
    controller = AdmissionController(limits(body_bytes=49, response_bytes=1, in_flight_bytes=100, requests=4))
    with controller.admit(10, "greedy") as first, controller.admit(10, "greedy"):
        controller.add_bytes(first, 50)
        with pytest.raises(ApiError, match="this key has 2") as refused:
            controller.admit(10, "greedy").__enter__()
        assert refused.value.code == "overloaded"
        with pytest.raises(ApiError, match="too many bytes of this key's"):
            controller.add_bytes(first, 1)
        with controller.admit(10, "modest") as second:
            controller.add_bytes(second, 50)
    assert controller.in_flight == Load()
    assert not controller._keys


def test_work_that_would_miss_its_deadline_is_refused_at_once() -> None:
    async def scenario() -> None:
        controller = AdmissionController(limits())
        controller.images = measured(1.0)
        with controller.admit(10) as alone:
            await controller.reserve(alone, Load(images=15))  # without other work the estimate does not matter
            with pytest.raises(ApiError, match="15 s long, and the deadline is in 10 s") as refused:
                controller.admit(10).__enter__()
            with pytest.raises(ApiError):
                controller.admit(18).__enter__()  # there is a margin for errors of the estimate
            assert refused.value.retry_after == 7.5
            with controller.admit(30) as patient:
                await controller.reserve(patient, Load(images=1))

    run(scenario())


def test_queued_work_counts_for_the_estimated_wait() -> None:
    async def scenario() -> None:
        controller = AdmissionController(limits())
        controller.images = measured(1.0)
        with controller.admit(30) as first, controller.admit(30) as second:
            await controller.reserve(first, Load(images=15))
            waiting = asyncio.create_task(controller.reserve(second, Load(images=8)))
            await let_others_run()
            assert not waiting.done()
            with pytest.raises(ApiError, match="about 23 s long"):
                controller.admit(20).__enter__()
            waiting.cancel()

    run(scenario())


def test_a_keys_estimated_wait_counts_its_own_work_and_as_much_of_each_other_key() -> None:
    async def scenario() -> None:
        controller = AdmissionController(limits(in_flight=40))
        controller.images = measured(1.0)
        with controller.admit(30, "greedy") as first:
            await controller.reserve(first, Load(images=15))
            with controller.admit(3, "modest") as second:
                await controller.reserve(second, Load(images=1))  # it waits for one image of each key, not for sixteen
                with pytest.raises(ApiError, match="about 4 s long"):
                    controller.check(second, Load(images=1))

    run(scenario())


def test_slow_clients_and_unreadable_images_do_not_lengthen_the_estimated_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the time in which a body arrives, here 50 minutes, nor a rejected image counts as work of the model."""
    now = 1000.0
    monkeypatch.setattr("serve.admission.load.time.monotonic", lambda: now)
    controller = AdmissionController(limits())

    def reserve(permit: Permit, images: int) -> None:
        """Reserve capacity that is free, which needs no event loop."""
        with pytest.raises(StopIteration):
            controller.reserve(permit, Load(images=images)).send(None)

    for _ in range(20):
        with controller.admit(3600):
            now += 3000
        with controller.admit(60) as held:
            reserve(held, 1)
            controller.decoding.begin()
            now += 0.1
            controller.decoding.end(1, saturated=True)
    assert controller.images.seconds_per_item == 0
    assert controller.decoding.seconds_per_item <= 0.1
    with controller.admit(10) as held, controller.admit(10) as other:
        reserve(held, 4)
        reserve(other, 4)


def test_a_cancelled_request_in_the_queue_does_not_fail_the_one_that_ends() -> None:
    """Its deadline passes in the same turn of the event loop in which another request ends."""

    async def scenario() -> None:
        controller = AdmissionController(limits())
        ended: list[str] = []

        async def request(name: str, until: asyncio.Event) -> None:
            with controller.admit(10) as permit:
                await controller.reserve(permit, Load(images=18))
                await until.wait()
            ended.append(name)

        first_ends, later_ends = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(request("first", first_ends))
        await let_others_run()
        cancelled, last = (asyncio.create_task(request(name, later_ends)) for name in ("cancelled", "last"))
        await let_others_run()
        first_ends.set()
        await asyncio.sleep(0)
        cancelled.cancel()
        await first
        later_ends.set()
        await last
        assert ended == ["first", "last"]
        assert cancelled.cancelled()
        assert controller.in_flight == Load() == controller._queued

    run(scenario())


def test_a_large_request_gets_its_turn_beside_keys_that_always_send_small_ones() -> None:
    async def scenario() -> None:
        controller = AdmissionController(limits())
        done = 0
        large_done = False

        async def send_small(key: str) -> None:
            nonlocal done
            while not large_done and done < 5000:
                with controller.admit(60, key) as permit:
                    await controller.reserve(permit, Load(images=2))
                    await asyncio.sleep(0)
                    done += 1

        async def send_large() -> None:
            nonlocal large_done
            with controller.admit(60, "large") as permit:
                await controller.reserve(permit, Load(images=10))
            large_done = True

        async with asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(send_small("ab"[number % 2]))
            await let_others_run()
            group.create_task(send_large())
        assert large_done
        assert done < 500, "it was granted soon"

    run(scenario())


def test_texts_get_the_share_of_the_keys_that_send_texts() -> None:
    async def scenario() -> None:
        controller = AdmissionController(limits(in_flight=100))
        with ExitStack() as stack:
            permits = {key: stack.enter_context(controller.admit(10, key)) for key in ("text", "both", "a", "b")}
            assert controller.share_of_texts() == 1.0
            await controller.reserve(permits["text"], Load(texts=3))
            assert controller.share_of_texts() == 1.0
            for key in ("a", "b"):
                await controller.reserve(permits[key], Load(images=1))
            assert controller.share_of_texts() == pytest.approx(1 / 3)
            await controller.reserve(permits["both"], Load(images=1, texts=1))
            assert controller.share_of_texts() == pytest.approx(2 / 5)

    run(scenario())
