"""Folders on a disk that every worker sees."""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from storage.store import ATTEMPTS, Changed, Entry, Forbidden, NotFound, StoreError


class LocalStore:
    """Folders on a disk that every worker sees."""

    def list(self, prefix: str) -> Iterator[Entry]:
        yield from self._walk(_local(prefix), frozenset())

    def _walk(self, folder: str, parents: frozenset[str]) -> Iterator[Entry]:
        real = os.path.realpath(folder)
        if real in parents:  # a symbolic link to a folder above
            return
        try:
            children = sorted(os.scandir(folder), key=lambda child: child.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        except PermissionError as error:
            raise Forbidden(f"{folder}: {error.strerror}") from error
        for child in children:
            if child.is_dir():
                yield from self._walk(child.path, parents | {real})
                continue
            entry = self.stat(child.path)
            if entry is not None:  # else a dangling link, or removed since
                yield entry

    def stat(self, uri: str) -> Entry | None:
        path = _local(uri)
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Forbidden(f"{path}: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            return None
        return Entry(path, status.st_size, _local_etag(status))

    def read(self, uri: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        path = _local(uri)
        try:
            with open(path, "rb") as file:
                if etag and _local_etag(os.fstat(file.fileno())) != etag:
                    raise Changed(f"{path} changed since it was listed")
                file.seek(start)
                return file.read(-1 if stop is None else stop - start)
        except FileNotFoundError as error:
            raise NotFound(f"{path}: no such file") from error
        except OSError as error:
            raise Forbidden(f"{path}: {error.strerror}") from error

    def put(self, uri: str, data: bytes) -> Entry:
        path = Path(_local(uri))
        with self._temporary(path, data) as temporary:
            os.replace(temporary, path)
        entry = self.stat(str(path))
        if entry is None:
            raise StoreError(f"{path} vanished while it was written")
        return entry

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        path = Path(_local(uri))
        with self._temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return path.read_bytes() == data
        return True

    def delete(self, uri: str) -> None:
        path = Path(_local(uri))
        path.unlink(missing_ok=True)
        # S3 has no folders: an empty one means nothing here either.
        with contextlib.suppress(OSError):
            path.parent.rmdir()

    @contextlib.contextmanager
    def _temporary(self, path: Path, data: bytes) -> Iterator[Path]:
        """`data` safely on the disk under a name of its own beside `path`, gone afterwards."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            for attempt in range(ATTEMPTS):
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with open(temporary, "wb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    break
                except FileNotFoundError:  # another task just removed the empty folder
                    if attempt == ATTEMPTS - 1:
                        raise
            yield temporary
        except OSError as error:
            raise Forbidden(f"{path}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)


def _local(uri: str) -> str:
    return uri.removeprefix("file://")


def _local_etag(status: os.stat_result) -> str:
    return f"{status.st_size:x}-{status.st_mtime_ns:x}"
