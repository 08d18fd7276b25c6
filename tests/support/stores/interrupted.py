"""A local store in which a process is killed at its n-th write or delete. Then nothing is written any more."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import pytest

from pipelines.output.output import Output
from storage.local import LocalStore
from storage.store import Entry


class Killed(BaseException):
    """The process was killed."""


class InterruptedStore(LocalStore):
    """Raises `Killed` in place of the write or delete with the number `left`, counted from 0, and of all later ones.

    A write that is interrupted leaves a temporary file, as a process does that is killed while it writes.
    """

    def __init__(self, left: int) -> None:
        self.left = left

    def put(self, uri: str, data: bytes | IO[bytes]) -> Entry:
        self._count(uri)
        return super().put(uri, data)

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        self._count(uri)
        return super().put_if_absent(uri, data)

    def delete(self, uri: str) -> None:
        self._count()
        super().delete(uri)

    def _count(self, written: str | None = None) -> None:
        self.left -= 1
        if self.left == -1 and written is not None:
            folder, name = os.path.split(written)
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, f".{name[:50]}.{uuid.uuid4().hex}.tmp"), "wb") as file:
                file.write(b"half")
        if self.left < 0:
            raise Killed


@contextmanager
def interrupted(left: int) -> Iterator[InterruptedStore]:
    """Let the store of every `Output` that is made in the `with` block be interrupted after `left` writes."""
    store = InterruptedStore(left)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "store", store)
        yield store


def kill_everywhere(act: Callable[[int], object]) -> Iterator[int]:
    """Call `act` with 0, 1 and so on, killed after so many writes, until it is not killed. Yield after each kill."""
    left = 0
    while True:
        with interrupted(left):
            try:
                act(left)
            except Killed:
                pass
            else:
                return
        yield left
        left += 1
