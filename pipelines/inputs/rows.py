"""The types of the reading side: planned inputs, rows, and the settings for reading."""

from __future__ import annotations

import hashlib
import json
import traceback
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import pyarrow as pa

from pipelines.config import ParquetConfig
from pipelines.inputs.web.config import FetchConfig
from siglip.images.decode import ImageRejected
from storage.store import Changed, Entry, Forbidden, NotFound, StoreError, StoreOptions, show

Kind = Literal["image", "tar", "parquet", "uri"]

WaitReason = Literal["missing", "forbidden", "changed", "unreachable", "error", "stopped"]
"""Why a planned object was not read. At the next run it may be readable again. `error` is not of the store: reading or
committing the shard raised an exception, or ended its process. `stopped` shards were not begun before the end of the
run's time."""

_EXAMPLES = 3
"""The number of names that are kept for each reason of `Skipped`."""
_COLUMNS_LISTED = 20
"""The most columns that `ReadColumns` describes one by one."""
_PHRASES, _SUFFIX_CHARS = 100, 20
"""The most suffixes that `Skipped` counts one by one, and the longest of them."""
_OTHER_SUFFIXES = "files with other suffixes"

ROW_VERSION = "row "
"""What the version of a list's row with other columns begins with. No version of an object does."""


@dataclass(frozen=True)
class Input:
    """One planned input: an object, or a part of a Parquet file.

    `start` and `stop` are the range of row groups of a Parquet file, and `column` is its image column; None in plans
    that were made before the column was stored. `rows` is exact for Parquet files and loose images, and an estimate for
    tars, whose images are counted when they are read. For an image named in a list, `size` is -1 and `etag` is empty,
    because the object was not looked up when it was planned.
    """

    kind: Kind
    uri: str
    key: str
    size: int
    etag: str
    start: int = 0
    stop: int = 0
    rows: int = 1
    metadata: str | None = None
    column: str | None = None

    @property
    def entry(self) -> Entry:
        """The object to read, as the listing described it."""
        return Entry(self.uri, self.size, self.etag)

    @property
    def version(self) -> str:
        """Text that differs if the object has changed since it was planned.

        For a row of a list it is empty, or a digest of the row's other columns. Their order does not count, nor blanks
        around their names, nor the column without a name (pandas' index, which changes when a list grows).
        """
        if self.kind != "uri":
            return f"{self.size} {self.etag}"
        text = None if self.metadata is None else _compared(self.metadata)
        return "" if not text else ROW_VERSION + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _compared(metadata: str) -> str:
    """Return what is compared of a row's metadata, also of a plan of an earlier version: "" if there is nothing."""
    try:
        found = json.loads(metadata, parse_float=_parse_number)
        columns = sorted((name.strip(), name, value) for name, value in found.items() if name.strip())
        return json.dumps([(name, value) for name, _, value in columns], sort_keys=True) if columns else ""
    except (ValueError, RecursionError):
        return metadata


def _parse_number(text: str) -> float:
    """Return the number of a JSON text. 1.0 and 1 are equal: pandas writes integers so if one is missing."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


@dataclass(frozen=True)
class InputStats:
    """The result of inspecting an archive: its parts of about a shard's size each, or no part if it has no images.

    Without parts, `skipped` says why, as a phrase in the plural. For a Parquet file it also holds the name of the image
    column (`column`), the columns (`schema`), and the passed-through columns whose integers the file's statistics prove
    to be within 2^53 (`small_integers`).
    """

    parts: list[Input]
    schema: pa.Schema | None = None
    small_integers: frozenset[str] = frozenset()
    column: str = ""
    skipped: str = ""


@dataclass
class Row:
    """One image: its encoded bytes, or the reason why it is rejected.

    `columns` are the passed-through columns, each an Arrow array of length 1: a conversion to Python objects and back
    could change values. In the row of a broken or missing archive, `lost` estimates how many more images it held. Of an
    image from the web, `note` says what its host answered, and `trouble` names the host and what it did, if it was in
    trouble and a later run may get the image. `number` is the row's place in the order of a shard's inputs, which
    `read_inputs` sets.
    """

    key: str
    source: str
    data: bytes | None = None
    rejected: ImageRejected | None = None
    metadata: str | None = None
    columns: dict[str, pa.Array] = field(default_factory=dict)
    lost: int = 0
    note: str = ""
    trouble: str = ""
    number: int = -1

    @cached_property
    def sha256(self) -> str | None:
        """The hex SHA-256 of the encoded bytes, or None without bytes. Computed once: a retry compares it too."""
        return None if self.data is None else hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Reading:
    """The settings for reading, the same for all inputs of a job. `columns` are the output's passed-through columns.

    `fetch` are the settings of one reader. `last` tells whether a host that is in trouble now is not tried again.
    """

    store: StoreOptions
    max_bytes: int
    parquet: ParquetConfig
    columns: pa.Schema = field(default_factory=lambda: pa.schema([]))
    on_changed: Literal["error", "retag"] = "error"
    on_missing: Literal["wait", "reject"] = "wait"
    fetch: FetchConfig = field(default_factory=FetchConfig)
    last: bool = False

    def reject_or_raise(self, planned: Input, error: StoreError, read: int = 0) -> Row:
        """Return the reject row for a planned object that could not be read, if the configuration says to reject it.

        `read` is the number of its images that were read before. Otherwise raises `error`, and the shard is left to the
        next run.
        """
        if isinstance(error, NotFound) and self.on_missing == "reject":
            reason = "missing"
        elif isinstance(error, Changed) and self.on_changed == "retag":
            reason = "changed"
        else:
            raise error
        return lost_row(planned, reason, str(error), read)


class InputError(Exception):
    """Reading an input raised an exception that no reader expects. The message names the input and the exception."""

    def __init__(self, planned: Input, error: Exception) -> None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        super().__init__(f"{planned.uri}: {type(error).__name__}: {' '.join(str(error).split())}{place}")


def lost_row(planned: Input, reason: str, detail: str, read: int) -> Row:
    """Return the reject row of a missing image, or of an archive of which only `read` images could be read."""
    lost = max(0, planned.rows - read - 1)
    if lost:
        detail = f"{detail} (about {lost + 1} images are lost)"
    return Row(planned.key, planned.uri, rejected=ImageRejected(reason, detail), lost=lost)


def wait_reason(error: StoreError) -> WaitReason:
    """Return the reason for waiting that belongs to an error of the store."""
    kinds: tuple[tuple[type[StoreError], WaitReason], ...] = (
        (NotFound, "missing"),
        (Forbidden, "forbidden"),
        (Changed, "changed"),
    )
    return next((reason for kind, reason in kinds if isinstance(error, kind)), "unreachable")


@dataclass
class Skipped:
    """Objects and tar members that are not inputs: counts by reason, and for each reason the names of the first few."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, why: str) -> None:
        """Count an object. `why` is a phrase in the plural, such as "hidden files"."""
        self.counts[why] += 1
        examples = self.examples.setdefault(why, [])
        if len(examples) < _EXAMPLES:
            examples.append(show(name))

    def add_suffix(self, name: str) -> None:
        """Count an object that is skipped because of its suffix, or because it has none."""
        file = name.lower().rpartition("/")[2]
        suffix = file.rpartition(".")[2] if "." in file.lstrip(".") else ""
        phrase = f".{suffix} files" if suffix else "files without an extension"
        # Names may end with a number after a dot: then each has a suffix of its own.
        full = len(self.counts) >= _PHRASES and phrase not in self.counts
        self.add(name, _OTHER_SUFFIXES if full or len(suffix) > _SUFFIX_CHARS else phrase)


def fold_suffixes(counts: Counter[str]) -> dict[str, int]:
    """Return counts of `Skipped`, the most frequent first: about 100 of them, and one for all other suffixes."""
    found = Counter[str]()
    for number, (phrase, count) in enumerate(counts.most_common()):
        suffix = phrase.startswith(".") and phrase.endswith(" files")
        found[_OTHER_SUFFIXES if suffix and number >= _PHRASES else phrase] += count
    return dict(found.most_common())


@dataclass
class ReadColumns:
    """The columns that images are read from: for each kind of file and column the number of files, and the first."""

    files: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, column: str, uri: str) -> None:
        """Add a file. `kind` is a noun in the singular, such as "Parquet file"."""
        count, first = self.files.get((kind, column), (0, uri))
        self.files[kind, column] = count + 1, first

    def describe(self) -> list[str]:
        """Return a line for each kind of file and column, the most frequent first, and how many more there are."""
        ordered = sorted(self.files.items(), key=lambda item: -item[1][0])
        lines = [
            f"column `{show(column)}` of {show(first) if count == 1 else f'{count:,} {kind}s, such as {show(first)}'}"
            for (kind, column), (count, first) in ordered[:_COLUMNS_LISTED]
        ]
        more = len(ordered) - len(lines)
        return [*lines, f"{more:,} other columns"] if more else lines
