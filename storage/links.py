"""Links to folders on a disk: which of them a listing follows, so that each folder is read once."""

from __future__ import annotations

import os
from collections.abc import Iterable


class LinkedFolders:
    """The folders that links led to, in the listings of several prefixes that belong together.

    `prefixes` are all of them, as local paths. A folder below one of them is read without a link, so no link to it is
    followed. Held are the real paths of the prefixes, and two numbers for each folder that was read through a link.
    """

    def __init__(self, prefixes: Iterable[str]) -> None:
        self._roots = {real for path in prefixes if (real := real_path(path)) is not None}
        self._read: set[tuple[int, int]] = set()

    def enter(self, folder: str, status: os.stat_result, prefix: str) -> bool:
        """Tell whether to read a folder that was met through a link while `prefix` was listed, and note it as read.

        `folder` and `prefix` are real paths, and `status` is the folder's. Not read are a folder that contains the
        prefix, one that is in one of the prefixes, and one that was read before.
        """
        identity = (status.st_dev, status.st_ino)
        if f"{prefix}/".startswith(f"{folder.rstrip('/')}/") or self._is_listed(folder) or identity in self._read:
            return False
        self._read.add(identity)
        return True

    def _is_listed(self, folder: str) -> bool:
        while folder and folder not in self._roots:
            folder = folder.rpartition("/")[0]
        return folder in self._roots


class RealPaths:
    """Real paths of files below some roots: two names of a file that lead through links to one folder have the same.

    `roots` are local paths. A link that is itself a file is another file than its target. What is not below a root is
    left as it is: its disk may be gone, and a call could hang. Up to `_FOLDERS` folders are remembered.
    """

    _FOLDERS = 1 << 16

    def __init__(self, roots: Iterable[str]) -> None:
        local = [root.rstrip("/") for root in roots]
        self._below = tuple({f"{root}/" for root in local})
        self._beside = {root.rpartition("/")[0] for root in local}  # the folders of roots that are files
        self._folders: dict[str, str] = {}

    def of(self, path: str) -> str:
        """Return the real path of a file, given by an absolute path without `.` and `..`."""
        folder, slash, name = path.rpartition("/")
        real = self._folders.get(folder)
        if real is None:
            real = self._resolve(folder)
        return f"{real}{slash}{name}"

    def _resolve(self, folder: str) -> str:
        real: str | None = folder
        if folder in self._beside or f"{folder}/".startswith(self._below):
            above, _, name = folder.rpartition("/")
            known = self._folders.get(above) if f"{above}/".startswith(self._below) else None
            # Most folders are no links, and stand in a folder that is known: then one call of the system is enough.
            real = real_path(folder) if known is None or os.path.islink(folder) else f"{known}/{name}"
        if len(self._folders) >= self._FOLDERS:
            self._folders.clear()
        found = self._folders[folder] = folder if real is None else real
        return found


def real_path(path: str) -> str | None:
    """Return a path without links and without a slash at its end, so that `/` is "". None if no file can have it."""
    try:
        return os.path.realpath(path).rstrip("/")
    except ValueError:  # a NUL, or half of a character
        return None
