"""Small file systems in memory that a test fills up. Mounting them needs root."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 1 << 16


def why_not() -> str | None:
    """Say why this process cannot mount a file system, or return None."""
    with tempfile.TemporaryDirectory() as folder:
        done = _run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder)
        if done.returncode == 0:
            _run("umount", folder)
            return None
    return f"mounting needs root (in a container, CAP_SYS_ADMIN): {done.stderr.strip()}"


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "64m") -> Iterator[SmallDisk]:
    """Mount a file system on a folder until the `with` block ends. `size` is its size, as `mount` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    _check("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield SmallDisk(folder)
    finally:
        _run("umount", "-l", str(folder))


class SmallDisk:
    """A file system in memory, mounted on `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / ".filler"

    def fill(self) -> None:
        """Write a hidden file until no space is left."""
        with open(self._filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(os.urandom(_BLOCK))

    def resize(self, size: str) -> None:
        """Give the file system another size."""
        _check("mount", "-o", f"remount,size={size}", str(self.folder))

    def make_space(self) -> None:
        """Remove the hidden file."""
        self._filler.unlink()


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _check(*command: str) -> None:
    done = _run(*command)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
