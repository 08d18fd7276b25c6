"""A simulation of overload on a virtual clock, with and without admission's estimate of the wait.

python -m tests.quick.serve.test_overload   prints the figures that `serve.admission.controller` names
"""

from __future__ import annotations

import asyncio
import random
import selectors
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest import mock

import pytest

from serve.admission import controller as admission
from serve.admission.batcher import Batcher, Expired
from serve.admission.controller import AdmissionController
from serve.admission.load import Load
from serve.admission.service_time import ServiceTime
from serve.config import EndpointLimits
from serve.http.errors import ApiError

BATCH, BATCH_SECONDS = 16, 1.3
CAPACITY = BATCH / BATCH_SECONDS
"""Images/s of the simulated model: the base model on two cores."""
DEADLINE = 30.0

Result = TypeVar("Result")


class VirtualClock:
    """A clock whose time passes only while every coroutine waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def run(self, main: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine in an event loop on this clock. Meanwhile `time.monotonic` returns this clock's time."""
        clock = self

        class Selector(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> Any:
                ready = super().select(0)
                if not ready and timeout:
                    clock.now += timeout
                return ready

        loop = asyncio.SelectorEventLoop(Selector())
        with mock.patch.object(loop, "time", clock), mock.patch.object(time, "monotonic", clock):
            try:
                return loop.run_until_complete(main)
            finally:
                loop.close()


class NoEstimate(ServiceTime):
    """A service time that is never known, so that only the caps refuse requests."""

    seconds_per_item = 0.0


async def overload(service_time: ServiceTime, rates: dict[str, float], seconds: float) -> tuple[Counter[str], float]:
    """Send requests of one image at random times for `seconds`, on average `rates[key]` per second for each key.

    Returns the number of responses of each key in this time, and the mean seconds that refused requests waited.
    """
    limits = EndpointLimits.model_validate({"images": 1, "texts": 1, "labels": 2, "deadline_s": DEADLINE})
    controller = AdmissionController(limits)
    controller.images = service_time
    model = asyncio.Lock()

    async def run(items: list[int]) -> list[int]:
        async with model:
            await asyncio.sleep(BATCH_SECONDS * (len(items) + 1) / (BATCH + 1))
        return items

    batcher = Batcher(run, BATCH, runners=2, places=1, service_time=service_time)
    end = time.monotonic() + seconds
    responses: Counter[str] = Counter()
    refused_after: list[float] = []

    async def request(key: str) -> None:
        start = time.monotonic()
        try:
            with controller.admit(DEADLINE, key if len(rates) > 1 else None) as permit:
                async with asyncio.timeout(DEADLINE):
                    await controller.reserve(permit, Load(images=1))
                    await batcher.submit([0], permit.deadline, key)
            responses[key] += time.monotonic() <= end
        except (ApiError, Expired, TimeoutError):
            refused_after.append(time.monotonic() - start)

    async def send(key: str, rate: float) -> None:
        rng = random.Random(key)
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < end:
                await asyncio.sleep(rng.expovariate(rate))
                group.create_task(request(key))

    await asyncio.gather(*(send(key, rate) for key, rate in rates.items()))
    batcher.close()
    return responses, sum(refused_after) / max(1, len(refused_after))


def simulate(service_time: ServiceTime, rates: dict[str, float], seconds: float) -> tuple[dict[str, float], float]:
    """Run `overload` on a virtual clock. Returns responses/s by key, and the mean seconds until a refusal."""
    responses, waited = VirtualClock().run(overload(service_time, rates, seconds))
    return {key: responses[key] / seconds for key in rates}, waited


def test_under_overload_almost_all_of_the_models_capacity_becomes_responses() -> None:
    rates, waited = simulate(ServiceTime(), {"client": 2 * CAPACITY}, 200)
    assert rates["client"] > 0.95 * CAPACITY
    assert waited < 1, "a request that is refused must be refused at once"


def test_caps_alone_leave_little_of_the_capacity() -> None:
    """The reason why admission estimates the wait. If this test fails, the estimate may no longer be needed."""
    rates, waited = simulate(NoEstimate(), {"client": 2 * CAPACITY}, 200)
    assert rates["client"] < 0.5 * CAPACITY
    assert waited > 20


def test_a_key_within_its_share_is_served_while_another_overloads() -> None:
    rates, _ = simulate(ServiceTime(), {"greedy": 10 * CAPACITY, "modest": 1.0}, 100)
    assert rates["modest"] > 0.8
    assert rates["greedy"] > 0.8 * CAPACITY


@pytest.mark.parametrize("share", [0.8, 1.0])
def test_almost_all_capacity_is_used_with_a_margin_and_at_least_half_without_one(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "USED_DEADLINE", share)
    rates, _ = simulate(ServiceTime(), {"client": 2 * CAPACITY}, 100)
    assert rates["client"] > (0.95 if share < 1 else 0.5) * CAPACITY


if __name__ == "__main__":
    SCENARIOS = {"one client": {"client": 2 * CAPACITY}, "two keys": {"greedy": 10 * CAPACITY, "modest": 1.0}}
    for title, load in SCENARIOS.items():
        for name, kind, used in (("caps only", NoEstimate, 1.0), ("whole deadline", ServiceTime, 1.0),
                                 ("estimate", ServiceTime, admission.USED_DEADLINE)):  # fmt: skip
            admission.USED_DEADLINE = used
            responses, mean_wait = simulate(kind(), load, 200)
            print(f"{title:12} {name:15} {responses} responses/s, refused after {mean_wait:.1f} s")
