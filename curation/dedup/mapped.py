"""Arrays in temporary files that are larger than memory, with a bound on how much of them is resident."""

from __future__ import annotations

import mmap
import resource
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

HELD_BYTES = 2 * 2**30
"""As many bytes of mapped files may be in this process's memory before those of an array are given back."""
_ROWS = 1024
"""As many rows are read before it is looked how much that is. Linux maps up to 64 KiB around each of them."""
_LOOKED_AT = 2**20
"""It is looked too after reading or writing so many bytes. A look takes as long as reading some rows."""
_STATM = Path("/proc/self/statm")


class MappedArray:
    """An array in a file, whose pages this process gives back when it holds many. Threads may share it.

    The pages that are given back stay in the system's cache as long as it has room, and are read from the file
    otherwise. Linux counts mapped pages as memory of the process: without this, a process that has read 15 GB of
    embeddings has 15 GB, although the system can take them back. On systems without /proc nothing is given back.
    """

    def __init__(self, path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> None:
        """Make the file, with zeros."""
        mapped = np.memmap(path, dtype, "w+", shape=(max(1, shape[0]), *shape[1:]))
        self._mapping: mmap.mmap = mapped._mmap  # type: ignore[attr-defined]
        self._array = np.asarray(mapped)
        self._since = 0

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Return a copy of some rows."""
        if isinstance(index, np.ndarray) and index.dtype != np.bool_ and len(index) > _ROWS:
            many = np.empty((len(index), *self._array.shape[1:]), self._array.dtype)
            for start in range(0, len(index), _ROWS):
                part = index[start : start + _ROWS]
                many[start : start + len(part)] = self._array[part]
                self._count(_LOOKED_AT)
            return many
        found: NDArray[Any] = self._array[index]
        found = found if found.flags.owndata else found.copy()
        self._count(found.nbytes)
        return found

    def __setitem__(self, index: Any, values: Any) -> None:
        """Write some rows."""
        self._array[index] = values
        self._count(self._array[index].nbytes)

    def _count(self, size: int) -> None:
        self._since += size
        if self._since >= _LOOKED_AT:
            self._since = 0
            if read_mapped() > HELD_BYTES:
                self._mapping.madvise(mmap.MADV_DONTNEED)


def read_mapped() -> int:
    """Return how many bytes of mapped files are in this process's memory. 0 on a system that does not tell."""
    try:
        return int(_STATM.read_text().split()[2]) * resource.getpagesize()
    except OSError:
        return 0


Stored = MappedArray | NDArray[Any]
"""Rows in a file or in memory: what is taken from them by their indices is a copy."""
