"""`Progress`: the interface through which a job reports while it runs."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a run. `sightline.progress.RunProgress` shows it on the terminal."""

    def start(self, shards: int, rows: int) -> None:
        """Reading begins, of this many shards with about this many images."""

    def say(self, message: str) -> None:
        """A step begins that takes a while."""

    def update(
        self, *, rows: int = 0, rejects: int = 0, shards: int = 0, waiting: int = 0, rate: float | None = None
    ) -> None:
        """More work is done: rows written, how many of them are rejects, shards committed, shards left waiting.

        `rate` are the images per second until now, if the caller measures them.
        """
