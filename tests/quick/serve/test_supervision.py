"""A background task that ends is logged, counted and replaced, however it ends."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest

from serve.supervision import RESTART_SECONDS, Supervisor


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def fail() -> None:
    raise KeyError("unexpected")


async def end() -> None:
    return


async def wait() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("ending", [fail, end, wait], ids=["exception", "return", "cancelled"])
def test_a_task_that_ends_is_replaced(ending: Callable[[], Awaitable[None]], caplog: pytest.LogCaptureFixture) -> None:
    starts: list[float] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()

        async def work() -> None:
            starts.append(loop.time())
            if len(starts) <= 2:
                if ending is wait:
                    for task in supervisor._tasks:
                        task.cancel()
                await ending()
                return
            await wait()

        supervisor = Supervisor()
        supervisor.start("the task of this test", work)
        await wait_until(lambda: len(starts) == 3)
        assert supervisor.died == 2
        assert len(supervisor) == 1
        supervisor.close()

    asyncio.run(scenario())
    assert [record.getMessage() for record in caplog.records] == ["the task of this test ended"] * 2
    assert all(later - sooner >= 0.9 * RESTART_SECONDS for sooner, later in pairwise(starts))
    if ending is fail:
        assert "unexpected" in (caplog.records[0].exc_text or "")


def test_after_closing_no_task_is_replaced() -> None:
    async def scenario() -> None:
        supervisor = Supervisor()
        supervisor.start("one", wait)
        supervisor.start("another", fail)
        await wait_until(lambda: supervisor.died == 1)
        supervisor.close()
        await asyncio.sleep(2 * RESTART_SECONDS)
        assert supervisor.died == 1
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_tasks_have_a_context_of_their_own_also_after_a_restart() -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    async def scenario() -> None:
        async def work() -> None:
            seen.append(request.get())
            if len(seen) == 1:
                raise KeyError
            await wait()

        request.set("the first request")
        supervisor = Supervisor()
        supervisor.start("the task of this test", work)
        await wait_until(lambda: len(seen) == 2)
        supervisor.close()

    asyncio.run(scenario())
    assert seen == ["none", "none"]
