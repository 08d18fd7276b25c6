"""Supervision of background tasks: one that ends is logged, counted and replaced."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any

from serve.log import log

RESTART_SECONDS = 0.1
"""Shortest time between two starts of the same task: one that fails at once must not use up the event loop."""


class Supervisor:
    """Runs tasks that never end by themselves, and replaces those that end all the same, however they end.

    Each task has a `contextvars` context of its own: Ray Serve cancels the calls that were made in a request's context
    when that request's client disconnects. `died` counts the tasks that ended before `close`. Not thread-safe: for one
    event loop.
    """

    def __init__(self) -> None:
        self.died = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0
        self._closed = False

    def __len__(self) -> int:
        """The number of tasks that were started; each of them runs, or is about to be replaced."""
        return self._count

    def start(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `work` as a task, and again whenever it ends. `name` is for the log, such as `a batch runner`."""
        self._count += 1
        self._run(name, work)

    def close(self) -> None:
        """Cancel all tasks. Start none afterwards."""
        self._closed = True
        for task in self._tasks:
            task.cancel()

    def _run(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        started = loop.time()

        def replace(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if self._closed:
                return
            self.died += 1
            log.error("%s ended", name, exc_info=None if task.cancelled() else task.exception())
            pause = max(0.0, started + RESTART_SECONDS - loop.time())
            loop.call_later(pause, self._run, name, work)

        context = contextvars.Context()
        task = loop.create_task(work(), context=context)
        task.add_done_callback(replace, context=context)
        self._tasks.add(task)
