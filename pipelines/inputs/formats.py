"""The input formats. A new archive format is one module in this folder, and an entry in `ARCHIVES`.

Such a module implements `Archive`. `read` must yield a part's rows in the same order each time, because row numbers
follow from the order. Members of a list (`lists.py`) are images of the kind `uri`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from pipelines.config import JobConfig
from pipelines.inputs import images, lists, parquet, tar
from pipelines.inputs.rows import Input, InputError, InputStats, Kind, ReadColumns, Reading, Row, Skipped
from pipelines.inputs.web.images import fetch_urls
from storage.schemes import is_web
from storage.settings import ConfigError
from storage.store import Entry, StoreError, StoreOptions


class Archive(Protocol):
    """The interface of an archive format: a kind of input that holds many images. `KIND` is its name in the plan."""

    KIND: Kind

    def recognizes(self, name: str) -> bool:
        """Tell whether an object has this format, by its lower-case name."""

    def inspect(self, planned: Input, config: JobConfig, options: StoreOptions) -> InputStats:
        """Inspect a new input, and split it into parts of about a shard's size.

        Raises `StoreError` if the input cannot be read now, `ConfigError` if the configuration does not fit it.
        """

    def read(self, planned: Input, reading: Reading, skipped: Skipped) -> Iterator[Row]:
        """Yield the rows of one part. Raises `StoreError` if the store fails or the object has changed."""


ARCHIVES: dict[Kind, Archive] = {archive.KIND: archive for archive in (tar, parquet)}
"""The archive formats, by kind."""


def archive_of(name: str) -> Archive | None:
    """Return the archive format of an object with this lower-case name, or None."""
    return next((archive for archive in ARCHIVES.values() if archive.recognizes(name)), None)


def open_list(
    entry: Entry, config: JobConfig, options: StoreOptions, skipped: Skipped, columns: ReadColumns
) -> Iterator[Input] | None:
    """Return the rows of a configured input that is a list, or None for any other. Raises as `lists.expand` does."""
    if lists.recognizes(entry.uri.lower()):
        return lists.expand(entry, config.lists.column, options, skipped, columns, config.fetch.enabled)
    return parquet.open_list(entry, config, options, skipped, columns)


def read_inputs(planned: Iterable[Input], reading: Reading, skipped: Skipped) -> Iterator[tuple[Input, Row]]:
    """Yield the rows of a shard's inputs, each with its input. Consecutive loose images are fetched in parallel.

    The numbers of the rows are in the order of the inputs. Only images from the web come in another order.

    Raises `StoreError` if the store fails, or if an input has changed since it was planned; `ConfigError` if the
    configuration does not fit an input; and `InputError` for any other exception, so that its message names the input.
    """
    loose: list[Input] = []
    count = 0
    for item in planned:
        archive = ARCHIVES.get(item.kind)
        if archive is None:
            loose.append(item)
            continue
        yield from _read_loose(loose, count, reading)
        count += len(loose)
        loose = []
        try:
            for row in archive.read(item, reading, skipped):
                row.number = count
                yield item, row
                count += 1
        except (StoreError, ConfigError):
            raise
        except Exception as error:
            raise InputError(item, error) from error
    yield from _read_loose(loose, count, reading)


def _read_loose(loose: list[Input], first: int, reading: Reading) -> Iterator[tuple[Input, Row]]:
    """Yield the rows of loose images, of which the first has the number `first`: those from the web last."""
    numbered = list(enumerate(loose, first))
    stored = [(number, item) for number, item in numbered if not is_web(item.uri)]
    rows = images.fetch_images((item for _, item in stored), reading)
    for (number, item), row in zip(stored, rows, strict=True):
        row.number = number
        yield item, row
    yield from fetch_urls([(number, item) for number, item in numbered if is_web(item.uri)], reading)


__all__ = ["ARCHIVES", "Archive", "archive_of", "images", "lists", "open_list", "read_inputs"]
