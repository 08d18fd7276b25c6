"""A prefix of the object store, copied to this machine once and found again."""

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
    """Copies of prefixes in the folder `SIGHTLINE_CACHE` (~/.cache/sightline), each named after its files' ETags.

    Small and picklable: every node has its own copies. Knows nothing of what is in the files. Nothing is ever removed.
    """

    options: StoreOptions

    def identify(self, prefix: str, wanted: Callable[[str], bool]) -> str:
        """A string that changes when one of the wanted files directly under the prefix does. Raises `StoreError`."""
        return self._look(open_store(prefix, self.options), prefix, wanted)[0]

    def fetch(self, prefix: str, wanted: Callable[[str], bool], now: Callable[[str], bool]) -> tuple[Path, str]:
        """The folder of the wanted files' copy, of which those that are needed `now` are there; and its identity.

        Several processes may fetch at once: a file appears under its name when it is whole. Raises `StoreError`.
        """
        store = open_store(prefix, self.options)
        identity, entries = self._look(store, prefix, wanted)
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

    def _look(self, store: Store, prefix: str, wanted: Callable[[str], bool]) -> tuple[str, dict[str, Entry]]:
        root = prefix.rstrip("/") + "/"
        found = {e.uri.removeprefix(root): e for e in store.list(prefix)}
        entries = {name: found[name] for name in sorted(found) if "/" not in name and wanted(name)}
        if not entries:
            raise NotFound(f"{prefix}: there is no checkpoint under this prefix")
        # With the quotes that S3 puts around ETags: copies that were made before stay valid.
        lines = "\n".join(f'{name} "{entry.etag}"' for name, entry in entries.items())
        return hashlib.sha256(lines.encode()).hexdigest(), entries


def _copy(store: Store, entry: Entry, target: Path) -> None:
    """Whole or not at all: half of a file is not left, whatever fails."""
    file = tempfile.NamedTemporaryFile(dir=target.parent, delete=False)  # noqa: SIM115
    try:
        with file, StoreFile(store, entry) as source:
            while chunk := source.read(READ_BYTES):
                file.write(chunk)
        os.replace(file.name, target)
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise
