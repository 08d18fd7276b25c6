"""Files of registered label sets, which are read again while the server runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from siglip.labels import LabelSet

REREAD_SECONDS = 2.0
"""Seconds between two readings of the label sets' files."""


class LabelFiles:
    """Finds changes in the files of label sets. A source is a file's path, or a mapping whose `names` is a path.

    Each reading compares the whole content of a file, because this finds every kind of change: an edit, a rename, a
    Kubernetes ConfigMap whose symbolic link is replaced. A source without a file never changes.
    """

    def __init__(self, sources: dict[str, Any]) -> None:
        self._sources = sources
        self._seen = {name: _read(source) for name, source in sources.items()}

    def list_changes(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name and the new content of each file that differs from the content last marked as seen.

        The content of an unreadable file is empty.
        """
        for name, source in self._sources.items():
            content = _read(source)
            if content != self._seen[name]:
                yield name, content

    def parse(self, name: str) -> LabelSet:
        """Read a label set from its file. Raises `ValueError`."""
        return LabelSet.model_validate(self._sources[name])

    def mark_seen(self, name: str, content: bytes) -> None:
        """Mark this content as seen, so that `list_changes` does not yield it again, whether it was usable or not."""
        self._seen[name] = content


def find_path(source: Any) -> Path | None:
    """Return the path of the file that a label set's source names, or None if it names no file."""
    named = source.get("names") if isinstance(source, dict) else source
    return Path(named) if isinstance(named, str) else None


def _read(source: Any) -> bytes:
    path = find_path(source)
    try:
        return path.read_bytes() if path else b""
    except OSError:
        return b""
