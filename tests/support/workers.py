"""Find Ray's worker processes by their titles. Ray sets the title to what the worker runs at the moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import psutil


def read_titles(processes: Iterable[psutil.Process]) -> Iterator[tuple[psutil.Process, str]]:
    """Yield each process that has not ended, with its title."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            yield process, " ".join(process.cmdline())


def find_workers(title: str) -> list[psutil.Process]:
    """Return the workers below this process whose titles begin with `title`."""
    below = psutil.Process().children(recursive=True)
    return [process for process, found in read_titles(below) if found.startswith(title)]


def find_decoders(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that decode images, without the decoder servers, which have the same command line."""
    found = []
    for process, title in read_titles(processes):
        with contextlib.suppress(psutil.Error):
            if "siglip.images.decoder_process" in title and process.name() == "decoder":
                found.append(process)
    return found


def choose_workers(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that run a task or an actor of Ray, their decoders and their decoder servers."""
    return [
        process
        for process, title in read_titles(processes)
        if (title.startswith("ray::") and "Agent" not in title) or "siglip.images.decoder_process" in title
    ]
