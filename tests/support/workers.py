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


def find_decoders(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes that decode images, without the servers that fork them and have the same command line."""
    found = []
    for process, title in read_titles(processes):
        with contextlib.suppress(psutil.Error):
            if "siglip.images.decoder_process" in title and process.name() == "decoder":
                found.append(process)
    return found


def choose_workers(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that run a task or an actor, or are a decoder or decoder server of one."""
    return [
        process
        for process, title in read_titles(processes)
        if (title.startswith("ray::") and "Agent" not in title) or "siglip.images.decoder_process" in title
    ]
