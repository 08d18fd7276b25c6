"""Ray's processes, by the names that Ray gives them: they say what each runs now."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import psutil


def read_titles(processes: Iterable[psutil.Process]) -> Iterator[tuple[psutil.Process, str]]:
    """Those that have not ended, each with its title."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            yield process, " ".join(process.cmdline())


def find_workers(title: str) -> list[psutil.Process]:
    """Workers of the Ray that this process started whose titles begin so."""
    below = psutil.Process().children(recursive=True)
    return [process for process, found in read_titles(below) if found.startswith(title)]


def choose_workers(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that run a task or an actor, or are a decoder of one."""
    return [
        process
        for process, title in read_titles(processes)
        if (title.startswith("ray::") and "Agent" not in title) or "siglip.images.decoder" in title
    ]
