"""The kinds of input. A new one is one file here, and its name in `ARCHIVES`.

Each file has `KIND`, its mark in the plan; `recognizes`, by name; `size_up`, which looks at a new input and cuts it
into parts that fit a shard; and `read`, which gives its rows in a fixed order, so that the same part has the same rows
each time that it is read. The members of a list (`lists.py`) are images, of a kind of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from pipelines.config import JobConfig
from pipelines.inputs import images, lists, parquet, tar
from pipelines.inputs.rows import Input, InputStats, Kind, Reading, Row, Skipped
from storage.store import StoreOptions


class Archive(Protocol):
    """A kind of input that holds many images."""

    KIND: Kind

    def recognizes(self, name: str) -> bool:
        """Whether an object of this lower-case name is one."""

    def size_up(self, planned: Input, config: JobConfig, options: StoreOptions) -> InputStats:
        """A look at a new input, which cuts it into parts of about a shard's size.

        Raises `StoreError` when it cannot be looked at now, `ConfigError` when the configuration does not fit it.
        """

    def read(self, planned: Input, reading: Reading, skipped: Skipped) -> Iterator[Row]:
        """The rows of one part. Raises `StoreError` when the store fails, or the object is not the one planned."""


ARCHIVES: dict[Kind, Archive] = {archive.KIND: archive for archive in (tar, parquet)}
"""The formats of archives, by kind."""


def archive_of(name: str) -> Archive | None:
    """The archive format of an object with this lower-case name."""
    return next((archive for archive in ARCHIVES.values() if archive.recognizes(name)), None)


def read_inputs(planned: Iterable[Input], reading: Reading, skipped: Skipped) -> Iterator[tuple[Input, Row]]:
    """The rows of a shard's inputs, each with the input that it is of. Neighbouring loose images are fetched together.

    Raises `StoreError` when the store fails, or when an input is no longer what was planned.
    """
    loose: list[Input] = []
    for item in planned:
        archive = ARCHIVES.get(item.kind)
        if archive is None:
            loose.append(item)
            continue
        yield from zip(loose, images.fetch_images(loose, reading), strict=True)
        loose = []
        for row in archive.read(item, reading, skipped):
            yield item, row
    yield from zip(loose, images.fetch_images(loose, reading), strict=True)


__all__ = ["ARCHIVES", "Archive", "archive_of", "images", "lists", "read_inputs"]
