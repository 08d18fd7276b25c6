"""Keeps the page's snapshot up to the output, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from curation.browse.copy import LocalCopy
from curation.browse.snapshot import Snapshot
from curation.tagged_output import TaggedOutput, open_output
from pipelines.output.output import MANIFEST
from storage.settings import ConfigError
from storage.store import StoreError

SECONDS = 5.0
"""How often the follower looks whether the output has changed."""


@dataclass(frozen=True)
class State:
    """How far the copy is: `copied` of `wanted` rows, since when it is `complete`, and what keeps it from going on."""

    copied: int
    wanted: int
    complete: str | None
    problem: str


class Follower:
    """Copies an output, and takes up what later runs commit. `snapshot` is what there is.

    A problem, such as an output that a run is writing to now, leaves the snapshot as it is, and is in `state`.
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
        self._manifest = b""
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
        uri = self._output.uri
        while not self._stopped.is_set():
            try:
                manifest = self._output.output.read(MANIFEST)
                if manifest != self._manifest:
                    output = self._output if self._snapshot is None else open_output(uri)
                    self._copy.update(output, self._publish)
                    self._manifest = manifest
                    now = datetime.now(UTC).isoformat(timespec="seconds")
                    self._state = State(self._state.copied, output.rows, now, "")
                    self._tell(f"{output.rows:,} images are on the page")
            except _Stopped:
                return
            except (ConfigError, StoreError) as error:
                self._failure = error
                self._state = State(self._state.copied, self._state.wanted, self._state.complete, str(error))
            finally:
                self._ready.set()
            self._stopped.wait(self._seconds)

    def _publish(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._state = State(int(snapshot.live.sum()), snapshot.wanted, None, "")
        self._ready.set()
        if self._stopped.is_set():
            raise _Stopped


class _Stopped(BaseException):
    """The follower was closed while it copied."""
