"""What is planned, what is read of it, and how."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from pipelines.config import ParquetConfig
from siglip.images.decode import ImageRejected
from storage.store import Changed, Entry, Forbidden, NotFound, StoreError, StoreOptions

Kind = Literal["image", "tar", "parquet", "uri"]

WaitReason = Literal["missing", "forbidden", "changed", "unreachable"]
"""Why an object that was planned could not be read. Each may be over by the next run."""


@dataclass(frozen=True)
class Input:
    """One planned input. `start` and `stop` are row groups, of a Parquet file only. `rows` is exact for Parquet files
    and loose images, and an estimate for tars, whose images are counted when they are read.

    `size` is -1 and `etag` empty for an image named in a list: it was not looked at when it was planned.
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

    @property
    def entry(self) -> Entry:
        """The object to read."""
        return Entry(self.uri, self.size, self.etag)

    @property
    def version(self) -> str:
        """What tells a changed object from the planned one; empty for a name from a list."""
        return "" if self.kind == "uri" else f"{self.size} {self.etag}"


@dataclass(frozen=True)
class InputStats:
    """What a look at an archive tells: its parts, each of about a shard's size, none if it holds no images.

    Of a Parquet file also its columns, and which of those passed through hold only integers that a float64 holds too,
    as far as the file's statistics prove.
    """

    parts: list[Input]
    schema: pa.Schema | None = None
    small_integers: frozenset[str] = frozenset()


@dataclass
class Row:
    """One image on its way: its encoded bytes, or why there are none.

    `columns` are the columns passed through, each an array of one value, so that no value becomes a Python object and
    changes. `lost` is, on the row that stands for a broken or absent archive, about how many more images went.
    """

    key: str
    source: str
    data: bytes | None = None
    rejected: ImageRejected | None = None
    metadata: str | None = None
    columns: dict[str, pa.Array] = field(default_factory=dict)
    lost: int = 0


@dataclass(frozen=True)
class Reading:
    """How inputs are read; the same for all inputs of a job. `columns` are the passed columns of the output."""

    store: StoreOptions
    max_bytes: int
    parquet: ParquetConfig
    columns: pa.Schema = field(default_factory=lambda: pa.schema([]))
    on_changed: Literal["error", "retag"] = "error"
    on_missing: Literal["wait", "reject"] = "wait"

    def lose(self, planned: Input, error: StoreError, read: int = 0) -> Row:
        """The row that stands for a planned object which is given up, because the configuration says so.

        Raises `error` where it does not: the trouble is the store's, and the images are still to come. `read` images
        of it were read before.
        """
        if isinstance(error, NotFound) and self.on_missing == "reject":
            reason = "missing"
        elif isinstance(error, Changed) and self.on_changed == "retag":
            reason = "changed"
        else:
            raise error
        return lost_row(planned, reason, str(error), read)


def lost_row(planned: Input, reason: str, detail: str, read: int) -> Row:
    """The row of an archive that cannot be read from some point on, or of an image that is not there."""
    lost = max(0, planned.rows - read - 1)
    if lost:
        detail = f"{detail} (about {lost + 1} images are lost)"
    return Row(planned.key, planned.uri, rejected=ImageRejected(reason, detail), lost=lost)


def wait_reason(error: StoreError) -> WaitReason:
    """What the store's error says of the object that was to be read."""
    kinds: tuple[tuple[type[StoreError], WaitReason], ...] = (
        (NotFound, "missing"),
        (Forbidden, "forbidden"),
        (Changed, "changed"),
    )
    return next((reason for kind, reason in kinds if isinstance(error, kind)), "unreachable")


@dataclass
class Skipped:
    """Objects and members that are no input: counted by why, the first few by name."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, name: str, why: str) -> None:
        """Count one."""
        self.counts[why] += 1
        if len(self.examples) < 5:
            self.examples.append(name)

    def add_suffix(self, name: str) -> None:
        """Count one that is skipped for its suffix, or for having none."""
        file = name.lower().rpartition("/")[2]
        suffix = file.rpartition(".")[2] if "." in file.lstrip(".") else ""
        self.add(name, f".{suffix} files" if suffix else "files without an extension")
