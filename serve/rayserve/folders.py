"""The folder of a running endpoint's files: HAProxy's configuration and sockets.

`tempfile.TemporaryDirectory` leaves its folder behind when the process is killed. Here a folder has a lock that its
process holds, and the next process removes the folders whose locks are free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

PREFIX = "sl-"
LOCK = "lock"


@contextmanager
def make_folder(parent: Path = Path("/tmp")) -> Iterator[Path]:
    """Make an empty folder for this user only, and remove it afterwards. Its path is short.

    Before that, remove the folders that killed processes of this user left in `parent`.
    """
    remove_stale(parent)
    folder = Path(mkdtemp(prefix=PREFIX, dir=parent))
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)  # child processes do not inherit it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(mode=0o700, exist_ok=True)  # another process may have removed it before it was locked
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_stale(parent: Path) -> None:
    """Remove the folders of `make_folder` in `parent` whose processes have ended. Others are left as they are."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
