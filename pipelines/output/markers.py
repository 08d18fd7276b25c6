"""Markers: files in `runs/` by which runs and compactions tell each other, and `status`, that they are at work.

A marker is written before the work and deleted after it. One that stays is of a process that was killed. It tells the
next run where to look for commits that are not sealed, and for files that belong to no commit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pipelines.output.output import Output
from storage.store import NotFound

Kind = Literal["run", "compaction", "index"]
FORGOTTEN = timedelta(days=2)
"""A marker that has not been renewed for so long is of a process that was killed, wherever that process was."""
_UNKNOWN = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True)
class Marker:
    """What a process tells of its work on an output: the `segments` of the plan, and since when it is at work.

    `place` identifies the machine and `process` the process there, both empty where that is not known. `ended` is what
    a run that was interrupted tells of itself, in the words of the manifest's `runs`; None while it works.
    """

    id: str
    kind: Kind = "run"
    segments: tuple[int, ...] = ()
    started_at: datetime = _UNKNOWN
    updated_at: datetime = _UNKNOWN
    place: str = ""
    process: str = ""
    ended: dict[str, Any] | None = None

    def is_over(self) -> bool:
        """Tell whether its process is known to have ended, or has been silent for `FORGOTTEN`."""
        if self.ended is not None or datetime.now(UTC) - self.updated_at > FORGOTTEN:
            return True
        return bool(self.place) and self.place == _describe_place() and _describe_process(self.pid) != self.process

    @property
    def pid(self) -> int:
        """The number of the process, -1 if it is not known."""
        number = self.process.partition(" ")[0]
        return int(number) if number.isdecimal() else -1

    def write(self, output: Output) -> None:
        """Write the marker, or renew it. Raises `storage.store.StoreError`."""
        output.store.put(output.uri_of(marker_path(self.id)), self.dump())

    def dump(self) -> bytes:
        """Return the marker as `write` writes it."""
        about = asdict(self) | {
            name: getattr(self, name).isoformat(timespec="seconds") for name in ("started_at", "updated_at")
        }
        return json.dumps(about, ensure_ascii=False).encode()

    def renew(self, segments: Sequence[int], ended: dict[str, Any] | None = None) -> Marker:
        """Return the marker as it is to be written now."""
        return replace(self, segments=tuple(segments), updated_at=datetime.now(UTC), ended=ended)


def make_marker(id_: str, kind: Kind) -> Marker:
    """Return the marker of this process, which is not written yet."""
    now = datetime.now(UTC)
    return Marker(id_, kind, (), now, now, _describe_place(), _describe_process(os.getpid()))


def marker_path(id_: str) -> str:
    """Return a marker's path in its output."""
    return f"runs/{id_}.json"


def read_markers(output: Output) -> Iterator[Marker]:
    """Yield the markers of an output. One that cannot be read has no segments, and is over."""
    for name in output.store.names(output.uri_of("runs")):
        if name.endswith(".json"):  # a disk may have temporary files
            id_ = name.removesuffix(".json")
            try:
                data = output.read(marker_path(id_))
            except NotFound:  # the run has ended meanwhile
                continue
            yield parse_marker(id_, data)


def parse_marker(id_: str, data: bytes) -> Marker:
    """Parse what `Marker.dump` returned. What cannot be read has no segments, and is over."""
    try:
        about = json.loads(data)
        updated = _parse_time(about["updated_at"])
        return Marker(
            id_,
            "compaction" if about.get("kind") == "compaction" else "run",
            tuple(int(segment) for segment in about["segments"]),
            _parse_time(about["started_at"]) if "started_at" in about else updated,
            updated,
            str(about.get("place", "")),
            str(about.get("process", "")),
            about["ended"] if isinstance(about.get("ended"), dict) else None,
        )
    except (ValueError, KeyError, TypeError):
        return Marker(id_)


def _parse_time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _describe_process(pid: int) -> str:
    """Return a text that identifies a process on this machine, empty if there is none or if that cannot be known.

    It is the process's number and its start in clock ticks, because numbers are used again.
    """
    try:
        # The name of the program, which stands in brackets before, may have brackets and spaces in it.
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
    return f"{pid} {started}"


@cache
def _describe_place() -> str:
    """Return a text that identifies this machine, empty if that cannot be known.

    It is the machine's boot and the namespace of its process numbers: two containers may have the same name.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
