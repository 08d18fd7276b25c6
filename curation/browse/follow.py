"""Keeps the page's snapshot up to the output, in a thread of its own."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from curation.browse.copy import LocalCopy
from curation.browse.snapshot import Snapshot
from curation.tagged_output import TaggedOutput, open_output
from pipelines.output.output import MANIFEST
from storage.settings import ConfigError
from storage.store import StoreError

SECONDS, LONGEST = 5.0, 600.0
"""How often the follower looks whether the output has changed. After an attempt to copy it that failed, it waits twice
as long as before the last one, because each reads a part of the output again."""


@dataclass(frozen=True)
class State:
    """How far the copy is: `copied` of `wanted` rows, since when it is `complete`, and what keeps it from going on."""

    copied: int
    wanted: int
    complete: str | None
    problem: str


class Follower:
    """Copies an output, and takes up what later runs commit. `snapshot` is what there is.

    A problem, such as an output that is gone, leaves the snapshot as it is, is in `state` and is told once.
    """

    def __init__(
        self, output: TaggedOutput, folder: Path, seconds: float = SECONDS, tell: Callable[[str], None] = print
    ) -> None:
        self._output, self._seconds, self._tell = output, seconds, tell
        self._copy = LocalCopy(folder)
        self._stopped = threading.Event()
        self._ready = threading.Event()
        self._snapshot: Snapshot | None = None
        self._state = State(0, output.rows, None, "")
        self._tried = b""  # the manifest of the latest attempt to copy
        self._again, self._wait, self._told = 0.0, seconds, ""
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
        self._failure: Exception | None = None

    def start(self) -> Snapshot:
        """Start to copy, and return the first snapshot, which has the first rows.

        Raises `ConfigError` if there is no room for the copy, and `StoreError`.
        """
        self._thread.start()
        self._ready.wait()
        if self._snapshot is None:
            raise self._failure or ConfigError(f"{self._output.uri} cannot be copied")
        return self._snapshot

    def close(self) -> None:
        """Tell the thread to stop, and wait a little for it."""
        self._stopped.set()
        self._thread.join(5)

    @property
    def snapshot(self) -> Snapshot:
        """What there is of the output."""
        assert self._snapshot is not None, "start comes first"
        return self._snapshot

    @property
    def state(self) -> State:
        """How far the copy is."""
        return self._state

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._look()
            except _Stopped:
                return
            except Exception as error:  # whatever it is: the page goes on with what there is, and says so
                known = isinstance(error, (ConfigError, StoreError))
                told = str(error) if known else f"{type(error).__name__}: {error}"
                self._fail(error, " ".join(told.split()))
            finally:
                self._ready.set()
            self._stopped.wait(self._seconds)

    def _look(self) -> None:
        manifest = self._output.output.read(MANIFEST)
        if manifest == self._tried and time.monotonic() < self._again:
            if self._again == math.inf:  # there may have been a problem meanwhile, such as a store that was away
                self._state = replace(self._state, problem="")
            return
        if manifest != self._tried:
            self._tried, self._wait = manifest, self._seconds
        self._wait = min(LONGEST, 2 * self._wait)
        self._again = time.monotonic() + self._wait
        output = self._output if self._snapshot is None else open_output(self._output.uri)
        self._copy.update(output, self._publish)
        self._again, self._told = math.inf, ""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._state = State(self._state.copied, output.rows, now, "")
        self._tell(f"{output.rows:,} images are on the page")

    def _fail(self, error: Exception, problem: str) -> None:
        self._failure = error
        self._state = replace(self._state, problem=problem)
        if self._snapshot is not None and problem != self._told:
            self._told = problem
            self._tell(f"the page is not up to date: {problem}")

    def _publish(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._state = State(int(snapshot.live.sum()), snapshot.wanted, None, "")
        self._ready.set()
        if self._stopped.is_set():
            raise _Stopped


class _Stopped(BaseException):
    """The follower was closed while it copied."""
