"""Folders on a disk that every worker sees."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from typing import IO

from storage.store import ATTEMPTS, Changed, Entry, Forbidden, InvalidUri, NotFound, StoreError, Unreachable, show

_INVALID = frozenset((errno.ELOOP, errno.ENAMETOOLONG, errno.EILSEQ))
_FORBIDDEN = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))
# What a disk that other machines hold, or a failing one, answers.
_UNREACHABLE = frozenset(
    (
        errno.EIO,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ESHUTDOWN,
        errno.EREMOTEIO,
        errno.ENOLINK,
        errno.ENODEV,
        errno.EAGAIN,
    )
)
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
# What `link` answers on a file system that has no hard links.
_NO_LINKS = frozenset((errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL))
_RENAME_NOREPLACE = 1


class LocalStore:
    """Folders on a disk that every worker sees.

    A write is a temporary file beside the place, synced, then renamed or linked into it. Trouble of the disk is raised
    at once: the kernel and its network file systems have retried already.
    """

    def list(self, prefix: str) -> Iterator[Entry]:
        # One folder's names at a time, and no recursion: trees may be deeper than Python's stack.
        root = _local(prefix)
        open_folders: list[tuple[str, tuple[int, int], Iterator[str]]] = []

        def enter(folder: str, status: os.stat_result) -> None:
            identity = (status.st_dev, status.st_ino)
            if any(identity == above for _, above, _ in open_folders):  # a symbolic link to a folder above
                return
            try:
                names = sorted(os.listdir(folder))
            except (FileNotFoundError, NotADirectoryError):  # removed since
                return
            open_folders.append((folder, identity, iter(names)))

        with _translate(root):
            try:
                enter(root, os.stat(root))
            except (FileNotFoundError, NotADirectoryError):
                return
        while open_folders:
            folder, _, names = open_folders[-1]
            name = next(names, None)
            if name is None:
                open_folders.pop()
                continue
            path = f"{folder}{name}" if folder.endswith("/") else f"{folder}/{name}"
            with _translate(path):
                try:
                    status: os.stat_result | None = os.stat(path)
                except FileNotFoundError:
                    status = None
                if status and stat.S_ISDIR(status.st_mode):
                    enter(path, status)
                    continue
            if status and stat.S_ISREG(status.st_mode):
                yield Entry(path, status.st_size, _etag(status))
            elif status or os.path.islink(path):
                yield Entry(path, -1, "")

    def stat(self, uri: str) -> Entry | None:
        path = _local(uri)
        with _translate(path):
            try:
                status = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return Entry(path, status.st_size, _etag(status)) if stat.S_ISREG(status.st_mode) else None

    def read(self, uri: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        path = _local(uri)
        with _translate(path):
            # A pipe without a writer would be waited for.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(descriptor, "rb", buffering=0) as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise NotFound(f"{show(path)} is not a file")  # a folder, a pipe, a device
                if etag and _etag(status) != etag:
                    raise Changed(f"{show(path)} changed since it was listed")
                stop = status.st_size if stop is None else min(stop, status.st_size)
                if stop <= start:
                    return b""
                file.seek(start)
                data = file.read(stop - start)
                while len(data) < stop - start and (more := file.read(stop - start - len(data))):
                    data += more  # the kernel gives 2 GiB at most at once
                if len(data) < stop - start or (etag and _etag(os.fstat(descriptor)) != etag):
                    raise Changed(f"{show(path)} changed while it was read")
        return data

    def put(self, uri: str, data: bytes | IO[bytes]) -> Entry:
        path = _local(uri)
        with _translate(path, writing=True):
            status = _write(path, data, os.replace)
        return Entry(path, status.st_size, _etag(status))

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        path = _local(uri)
        for attempt in range(ATTEMPTS):
            with _translate(path, writing=True):
                try:
                    _write(path, data, _move_new)
                    return True
                except FileExistsError:
                    pass
            try:
                return self.read(path) == data
            except NotFound:
                if os.path.lexists(path):
                    raise StoreError(f"{show(path)} exists and is no file that can be read") from None
                time.sleep(0.05 * 2**attempt)  # removed since
        raise StoreError(f"{show(path)}: created and removed again and again by others")

    def delete(self, uri: str) -> None:
        path = _local(uri)
        with contextlib.suppress(NotFound), _translate(path):
            os.unlink(path)
        # S3 has no folders: an empty one means nothing here either.
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(path))


def _move_new(temporary: str, path: str) -> None:
    """Give a finished file its name, unless that is taken. Raises `FileExistsError`.

    By a hard link; on a file system without them by a rename that replaces nothing. Both are atomic, so nobody ever
    reads half a file, which creating it in place could not promise.
    """
    try:
        return os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        here = -100  # AT_FDCWD
        if not rename(here, os.fsencode(temporary), here, os.fsencode(path), _RENAME_NOREPLACE):
            return None
        number = ctypes.get_errno()
        if number not in _NO_LINKS:
            raise OSError(number, os.strerror(number), path)
    raise StoreError(
        f"{show(path)}: this file system can neither link a file nor rename it without replacing another, so two runs "
        "could not be told apart: use another disk or s3://"
    )


def _write(path: str, data: bytes | IO[bytes], move: Callable[[str, str], None]) -> os.stat_result:
    """`data` safely on the disk under a name of its own beside `path`, then moved there. The file's state, once it is.

    Another run that ends meanwhile removes folders that it finds empty, and what it takes for a killed run's: then all
    of it is done again. Raises what `move` raises.
    """
    folder, name = os.path.split(path)
    if name in ("", ".", ".."):
        raise InvalidUri(f"{show(path)}: no file can have this name")
    attempt = 0
    while True:
        # The name's beginning, by which a killed run's leftovers are recognised; all of it could be too long with more.
        temporary = os.path.join(folder, f".{name[:50]}.{uuid.uuid4().hex}.tmp")
        try:
            os.makedirs(folder or ".", exist_ok=True)
            with open(temporary, "wb") as file:
                if isinstance(data, bytes):
                    file.write(data)
                else:
                    data.seek(0)
                    shutil.copyfileobj(data, file)
                file.flush()
                os.fsync(file.fileno())
                status = os.fstat(file.fileno())
            move(temporary, path)
            return status
        except FileNotFoundError:
            attempt += 1
            if attempt == ATTEMPTS:
                raise
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def _translate(path: str, writing: bool = False) -> Iterator[None]:
    """The operating system's errors as the store's, by their number."""
    try:
        yield
    except OSError as error:
        raise _trouble(path, error, writing) from error
    except ValueError as error:  # a NUL, or a character that no name on this disk can have
        raise InvalidUri(f"{show(path)}: no file can have this name") from error


def _trouble(path: str, error: OSError, writing: bool) -> StoreError:
    number, what = error.errno or 0, error.strerror or str(error)
    if number in _INVALID:
        return InvalidUri(f"{show(path)}: {what}")
    if number in _FORBIDDEN:
        return Forbidden(f"{show(path)}: {what}")
    if number in _UNREACHABLE:
        return Unreachable(f"{show(path)}: {what}")
    if number in _FULL:
        return StoreError(f"{show(path)}: no space left on the disk ({what})")
    if number == errno.ENOENT or (number == errno.ENOTDIR and not writing):
        return NotFound(f"{show(path)}: no such file")
    if number == errno.EISDIR and not writing:
        return NotFound(f"{show(path)} is a folder, not a file")
    return StoreError(f"{show(path)}: {what}")


def _local(uri: str) -> str:
    path = uri.removeprefix("file://")
    if not path:
        raise InvalidUri(f"{show(uri) or 'an empty path'}: expected a path")
    return path


def _etag(status: os.stat_result) -> str:
    return f"{status.st_size:x}-{status.st_mtime_ns:x}"
