"""The store for local folders, on a disk that every worker sees."""

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

from storage.links import LinkedFolders
from storage.store import (
    ATTEMPTS,
    Changed,
    Entry,
    Forbidden,
    InvalidUri,
    LinkNotFollowed,
    NoSpace,
    NotFound,
    StoreError,
    Unreachable,
    show,
)

_INVALID = frozenset((errno.ENAMETOOLONG, errno.EILSEQ))
_FORBIDDEN = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))
# Errors of a network file system or a failing disk, which may pass.
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
# Errors of `link` on a file system without hard links.
_NO_LINKS = frozenset((errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL))
_RENAME_NOREPLACE = 1


class LocalStore:
    """Files in folders on a disk that every worker sees. See `storage.store.Store` for the methods.

    A write goes to a temporary file in the same folder, which is synced and then renamed or linked to its name. Disk
    errors are raised without a retry, because the kernel and its network file systems have already retried.
    """

    def list(
        self,
        prefix: str,
        unreadable: Callable[[str, StoreError], None] | None = None,
        links: LinkedFolders | None = None,
    ) -> Iterator[Entry]:
        # No recursion, because folders may be nested deeper than Python's stack. One folder's names at a time.
        root = _local(prefix)
        open_folders: list[tuple[str, str, Iterator[str]]] = []  # each with its real path if it is outside, else ""

        def enter(folder: str, outside: str, status: os.stat_result) -> None:
            """Open a folder. `outside` is its real path if it is below a link that led out of the root, else empty."""
            if open_folders and os.path.islink(folder):
                outside = os.path.realpath(folder)
            if outside and not followed.enter(outside, status, real_root):
                if unreadable is not None:
                    problem = "leads to a folder above, or to one that is read anyway"
                    unreadable(folder, LinkNotFollowed(f"{show(folder)} {problem}"))
                return
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # removed since
                open_folders.append((folder, outside, iter(sorted(os.listdir(folder)))))

        with _translate(root):
            real_root = os.path.realpath(root).rstrip("/")
            followed = LinkedFolders([root]) if links is None else links
            try:
                enter(root, "", os.stat(root))
            except (FileNotFoundError, NotADirectoryError):
                return
        while open_folders:
            folder, outside, names = open_folders[-1]
            start = folder if folder.endswith("/") else f"{folder}/"
            for name in names:
                path = start + name
                # Nearly every name is a file's, so nothing else is prepared for one.
                try:
                    status: os.stat_result | None = os.stat(path)
                except (OSError, ValueError):
                    status = None
                if status is not None and stat.S_ISREG(status.st_mode):
                    yield Entry(path, status.st_size, _etag(status))
                    continue
                try:
                    with _translate(path):
                        try:
                            status = os.stat(path)
                        except FileNotFoundError:
                            status = None
                        if status and stat.S_ISDIR(status.st_mode):
                            enter(path, outside and f"{outside}/{name}", status)
                            break
                except StoreError as error:
                    if unreadable is None:
                        raise
                    if isinstance(error, Forbidden) and not _may_look(path):
                        open_folders.pop()  # none of the folder's names may be looked at, so it is reported once
                        unreadable(folder, error)
                        break
                    unreadable(path, error)
                    continue
                if status and stat.S_ISREG(status.st_mode):
                    yield Entry(path, status.st_size, _etag(status))
                elif status or os.path.islink(path):
                    yield Entry(path, -1, "")
            else:
                open_folders.pop()

    def names(self, folder: str, start: str = "") -> Iterator[str]:
        path = _local(folder)
        with _translate(path):
            try:
                found = os.scandir(path)
            except (FileNotFoundError, NotADirectoryError):
                return
            with found:
                for one in found:
                    # A link is not followed: the file system would have to look at what it leads to.
                    if one.name.startswith(start) and not one.is_dir(follow_symlinks=False):
                        yield one.name

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
            # Without O_NONBLOCK, opening a pipe that has no writer would block.
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
                    data += more  # the kernel returns at most 2 GiB from one read
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
                except FileExistsError as error:
                    if file := _find_file_above(path):
                        raise InvalidUri(f"{show(path)}: {show(file)} is a file and not a folder") from error
            try:
                return self.read(path) == data
            except NotFound:
                if os.path.lexists(path):
                    raise StoreError(f"{show(path)} exists and is not a file that can be read") from None
                time.sleep(0.05 * 2**attempt)  # removed since
        raise StoreError(f"{show(path)}: other processes create and remove it repeatedly")

    def delete(self, uri: str) -> None:
        path = _local(uri)
        with contextlib.suppress(NotFound), _translate(path):
            os.unlink(path)
        # Object stores have no folders, so an empty folder is removed too.
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(path))


def _move_new(temporary: str, path: str) -> None:
    """Give a finished temporary file its name, unless a file has that name: then raise `FileExistsError`.

    Uses a hard link, or on a file system without hard links a rename that never replaces a file. Both are atomic. A
    file that is created under its final name could be read before it is complete.
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
        f"{show(path)}: this file system has neither hard links nor renames that never replace a file, so two runs "
        "could overwrite each other's commits: use another disk or an object store"
    )


def _write(path: str, data: bytes | IO[bytes], move: Callable[[str, str], None]) -> os.stat_result:
    """Write `data` to a temporary file in the folder of `path`, sync it, and `move` it there. Returns its status.

    A run that ends at the same time may remove the folder while it is empty, or the temporary file, which looks like
    one of a killed run. Then everything is done again. Raises the errors of `move`.
    """
    folder, name = os.path.split(path)
    if name in ("", ".", ".."):
        raise InvalidUri(f"{show(path)}: no file can have this name")
    attempt = 0
    while True:
        # Temporary files of a killed run are recognised by the start of the name. The whole name could get too long.
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
    """Raise errors of the operating system as `StoreError`s."""
    try:
        yield
    except OSError as error:
        raise _explain(path, error, writing) from error
    except ValueError as error:  # a NUL, or a character that no name on this disk can have
        raise InvalidUri(f"{show(path)}: no file can have this name") from error


def _explain(path: str, error: OSError, writing: bool) -> StoreError:
    """The store's error for an error of the operating system, by its number."""
    number, what = error.errno or 0, error.strerror or str(error)
    if number == errno.ELOOP:
        return LinkNotFollowed(f"{show(path)}: {what}")
    if number in _INVALID:
        return InvalidUri(f"{show(path)}: {what}")
    if number in _FORBIDDEN:
        return Forbidden(f"{show(path)}: {what}")
    if number in _UNREACHABLE:
        return Unreachable(f"{show(path)}: {what}")
    if number in _FULL:
        return NoSpace(f"{show(path)}: no space left on the disk ({what})")
    if number == errno.ENOENT or (number == errno.ENOTDIR and not writing):
        return NotFound(f"{show(path)}: no such file")
    if number == errno.EISDIR and not writing:
        return NotFound(f"{show(path)} is a folder, not a file")
    return StoreError(f"{show(path)}: {what}")


def _may_look(path: str) -> bool:
    """Whether the folder of a path lets this process look at the path itself, which may be a link to elsewhere."""
    try:
        os.lstat(path)
    except PermissionError:
        return False
    except OSError:
        return True
    return True


def _find_file_above(path: str) -> str | None:
    """Return the file that stands where a path has a folder, or None."""
    above = os.path.dirname(path)
    while above and above != os.path.dirname(above):
        if os.path.isfile(above):
            return above
        above = os.path.dirname(above)
    return None


def _local(uri: str) -> str:
    path = uri.removeprefix("file://")
    if not path:
        raise InvalidUri(f"{show(uri) or 'an empty path'}: expected a path")
    return path


def _etag(status: os.stat_result) -> str:
    return f"{status.st_size:x}-{status.st_mtime_ns:x}"
