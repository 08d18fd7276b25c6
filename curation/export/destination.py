"""The destination of an export: written under a temporary name beside it, and renamed when it is complete."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.schemes import scheme_of
from storage.settings import ConfigError

_MARK = ".partial"


def check_destination(destination: str, *, folder: bool) -> Path:
    """Return the path of a destination. Raises `ConfigError` unless it is a local path that is new, or an empty folder.

    A destination that is a file must be new.
    """
    if scheme_of(destination):
        raise ConfigError(f"{destination}: an export is written to a local path; copy it from there")
    path = Path(destination).absolute()
    try:
        if path.is_dir():
            if not folder:
                raise ConfigError(f"{path} is a folder: this target writes one file, so name a new file")
            if any(path.iterdir()):
                raise ConfigError(f"{path} is not empty: name a new folder")
        elif os.path.lexists(path):
            raise ConfigError(f"{path} exists: name a new {'folder' if folder else 'file'}")
        parent = path.parent
        if parent.exists() and not parent.is_dir():
            raise ConfigError(f"{parent} is not a folder")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    return path


def find_partial(path: Path) -> list[Path]:
    """Return what earlier exports to this destination left behind when they were killed."""
    try:
        return sorted(p for p in path.parent.iterdir() if p.name.startswith(f".{path.name[:50]}.") and _is_partial(p))
    except OSError:
        return []


@contextmanager
def open_new(path: Path, *, folder: bool) -> Iterator[Path]:
    """Give a temporary path beside `path`, which is renamed to `path` at the end of the `with` block.

    The path is an empty folder, or with `folder` false a file that does not exist yet. After an exception what was
    written is removed. A process that is killed leaves it under its temporary name: see `find_partial`. Raises
    `ConfigError` if the parent folder cannot be written to.
    """
    temporary = path.parent / f".{path.name[:50]}.{uuid.uuid4().hex}{_MARK}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        if not folder and os.path.lexists(path):
            raise ConfigError(f"{path} was created by another process: name a new file")
        temporary.rename(path)  # a folder is only renamed to a new or an empty one
    except BaseException:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def write_new(folder: Path, names: Iterator[str] | list[str], data: bytes) -> str:
    """Write a file below a folder under the first of some names that is free, and return that name.

    A name is not free if a file has it, also one in other case on a disk that does not tell them apart, or if one of
    its folders is a file. The last name must be free.
    """
    *others, last = names
    for name in others:
        try:
            return _write(folder, name, data)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue
    return _write(folder, last, data)


def _write(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        file.write(data)
    return name


def _is_partial(path: Path) -> bool:
    return path.name.endswith(_MARK)
