"""Registered label sets in files, which are read again while the server runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from siglip.labels import LabelSet

REREAD_SECONDS = 2.0
"""How long a change of a label set's file may go unseen."""


class LabelFiles:
    """Label sets that are paths of files, or mappings whose names are, as `LabelSet` reads both.

    A file is read whole each time, because that sees every kind of change: an edit, a rename, a Kubernetes ConfigMap
    whose symbolic link is swapped. Labels that are no file never change.
    """

    def __init__(self, sources: dict[str, Any]) -> None:
        self._sources = sources
        self._seen = {name: _read(source) for name, source in sources.items()}

    def changed(self) -> Iterator[tuple[str, bytes]]:
        """Names whose file has other bytes than those that were taken last, and these. An unreadable one has none."""
        for name, source in self._sources.items():
            content = _read(source)
            if content != self._seen[name]:
                yield name, content

    def parse(self, name: str) -> LabelSet:
        """A set as its file has it now. Raises `ValueError`."""
        return LabelSet.model_validate(self._sources[name])

    def take(self, name: str, content: bytes) -> None:
        """These bytes were looked at, whatever came of it."""
        self._seen[name] = content


def path_of(source: Any) -> Path | None:
    """The file that a label set's source names, if it does."""
    named = source.get("names") if isinstance(source, dict) else source
    return Path(named) if isinstance(named, str) else None


def _read(source: Any) -> bytes:
    path = path_of(source)
    try:
        return path.read_bytes() if path else b""
    except OSError:
        return b""
