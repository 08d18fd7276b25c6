"""Display of a run's progress: a live line on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_SECONDS = 10.0
"""Seconds between two lines where the console is no terminal."""


class RunProgress:
    """Shows shards, images, images/s, rejects and the time left. Implements `pipelines.progress.Progress`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._logged = float("-inf")
        self._rows = self._rejects = self._shards = self._waiting = 0
        self._total_shards = self._total_rows = 0
        self._bar: Progress | None = None

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, message: str) -> None:
        """Print the step that begins, which takes a while."""
        self._console.print(f"[dim]{escape(message)} ...[/dim]", highlight=False)

    def start(self, shards: int, rows: int) -> None:
        """Print that work begins on this many shards with about this many images, and show the live line."""
        self._started = time.monotonic()
        self._total_shards, self._total_rows = shards, rows
        self._console.print(f"{shards} shards to do, about {rows:,} images", highlight=False)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("shards"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[rows]} images, {task.fields[rate]}/s, {task.fields[rejects]} rejected"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.add_task("shards", total=shards, rows="0", rate="0", rejects="0")
            self._bar.start()

    def update(
        self, *, rows: int = 0, rejects: int = 0, shards: int = 0, waiting: int = 0, rate: float | None = None
    ) -> None:
        """Add rows written, how many of these are rejects, shards committed, and shards left to the next run.

        `rate` are the images per second until now; None is measured from `start` on.
        """
        self._rows += rows
        self._rejects += rejects
        self._shards += shards
        self._waiting += waiting
        now = time.monotonic()
        if rate is None:
            rate = self._rows / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                advance=shards + waiting,
                rows=f"{self._rows:,}",
                rate=f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}",
                rejects=f"{self._rejects:,}",
            )
        elif now - self._logged >= LOG_SECONDS or (
            (shards or waiting) and self._shards + self._waiting == self._total_shards
        ):
            self._logged = now
            waiting_text = f"{self._waiting} shards wait, " if self._waiting else ""
            # The total is an estimate when there are tars among the inputs, and may be too low.
            left = f", about {max(self._total_rows - self._rows, 0) / rate:,.0f} s left" if rate > 0 else ""
            self._console.print(
                f"{self._shards}/{self._total_shards} shards, {self._rows:,} images, {rate:,.1f}/s, "
                f"{waiting_text}{self._rejects:,} rejected{left}",
                highlight=False,
                soft_wrap=True,
            )
