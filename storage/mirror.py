"""Local copies of prefixes in an object store: each version is downloaded once to each machine."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from storage.files import READ_BYTES, StoreFile
from storage.schemes import open_store
from storage.store import Entry, NotFound, Store, StoreError, StoreOptions


@dataclass(frozen=True)
class Mirror:
    """Local copies of prefixes, in the folder `SIGHTLINE_CACHE` (default ~/.cache/sightline).

    A copy's folder is named after the ETags of its files, so another version gets another folder. Copies are never
    removed. The object is small and picklable, and every node makes its own copies. It does not read the files.
    """

    options: StoreOptions

    def identify(self, prefix: str, wanted: Callable[[str], bool]) -> str:
        """A string that changes when a wanted file directly under the prefix changes. Raises `StoreError`."""
        return self._list(open_store(prefix, self.options), prefix, wanted)[0]

    def fetch(self, prefix: str, wanted: Callable[[str], bool], now: Callable[[str], bool]) -> tuple[Path, str]:
        """Download the `wanted` files that are needed `now`. Returns the folder of the copy, and its identity.

        Several processes may fetch at the same time: a file gets its name when it is complete. Raises `StoreError`.
        """
        store = open_store(prefix, self.options)
        identity, entries = self._list(store, prefix, wanted)
        root = Path(os.environ.get("SIGHTLINE_CACHE", "~/.cache/sightline")).expanduser()
        folder = root / identity
        for name, entry in entries.items():
            target = folder / name
            if target.exists() or not now(name):
                continue
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _copy(store, entry, target)
            except OSError as error:
                raise StoreError(
                    f"{target}: {error.strerror or error}: set SIGHTLINE_CACHE to a folder with room"
                ) from error
        return folder, identity

    def _list(self, store: Store, prefix: str, wanted: Callable[[str], bool]) -> tuple[str, dict[str, Entry]]:
        root = prefix.rstrip("/") + "/"
        found = {e.uri.removeprefix(root): e for e in store.list(prefix)}
        entries = {name: found[name] for name in sorted(found) if "/" not in name and wanted(name)}
        if not entries:
            raise NotFound(f"{prefix}: there is no checkpoint under this prefix")
        # The quotes around ETags are S3's. They are kept so that existing copies stay valid.
        lines = "\n".join(f'{name} "{entry.etag}"' for name, entry in entries.items())
        return hashlib.sha256(lines.encode()).hexdigest(), entries


def _copy(store: Store, entry: Entry, target: Path) -> None:
    """Download an object to a file. After an error no incomplete file is left."""
    file = tempfile.NamedTemporaryFile(dir=target.parent, delete=False)  # noqa: SIM115
    try:
        with file, StoreFile(store, entry) as source:
            while chunk := source.read(READ_BYTES):
                file.write(chunk)
        os.replace(file.name, target)
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise
