"""Processes of the Ray that the tests started, by the names that Ray gives them."""

from __future__ import annotations

import contextlib

import psutil


def find_workers(title: str) -> list[psutil.Process]:
    """Workers below this process whose titles begin so: they say what each runs now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return found
