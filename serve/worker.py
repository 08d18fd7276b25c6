"""A thread for the work of single requests that would stop the event loop: large bodies and responses, scoring."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from serve.admission.batcher import Batcher, Interrupted
from serve.http.errors import RETRY_AFTER, ApiError

Result = TypeVar("Result")


class WorkerThread:
    """Runs steps of requests' work in one thread. Requests with different API keys take turns, one step each.

    A step should take a few milliseconds: Python runs one thread at a time, so a call into C code that keeps the
    interpreter's lock delays the event loop for as long as it takes. One thread is enough for the same reason.
    """

    def __init__(self, name: str = "worker") -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._batcher: Batcher[tuple[Callable[[], Any], Callable[[Any], None]], Any] = Batcher(self._run, size=1)

    async def run(
        self,
        steps: Sequence[Callable[[], Result]],
        deadline: float,
        key: str = "",
        check: Callable[[Result], None] = lambda result: None,
    ) -> list[Result]:
        """Run steps of `key` in order and return their results. Steps of a disconnected client are not run.

        `check` is called with each result in the event loop; if it raises, the other steps are not run. Raises what a
        step or `check` raises, `ApiError`, and `serve.admission.batcher.Expired` when `deadline`, a time of
        `time.monotonic`, passed before a step began.
        """
        items = [(step, check) for step in steps]
        try:
            done = await self._batcher.submit(items, deadline, key)
        except Interrupted:
            raise ApiError("unavailable", "the work was cancelled: try again", retry_after=RETRY_AFTER) from None
        return done.results

    @property
    def died(self) -> int:
        """Batch runners that ended and were replaced since the start."""
        return self._batcher.died

    def close(self) -> None:
        """Stop the thread. Queued steps are never run."""
        self._batcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, items: list[tuple[Callable[[], Any], Callable[[Any], None]]]) -> list[Any]:
        [(step, check)] = items
        result = await asyncio.get_running_loop().run_in_executor(self._threads, step)
        check(result)
        return [result]
