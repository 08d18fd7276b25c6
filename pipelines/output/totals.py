"""Totals: the counts of an output's shards. The metadata of each ledger has what the ledger adds to them.

Here is also how a ledger is encoded.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output.output import Output
from storage.files import read_ahead
from storage.store import Entry, StoreError

LEDGER_VERSION = 1
_KEY = b"sightline.ledger"
_SCHEMA = pa.schema(
    [
        ("segment", pa.int32()),
        ("number", pa.int32()),
        ("generation", pa.int16()),
        ("kind", pa.string()),
        ("path", pa.string()),
        ("first", pa.int64()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("reasons", pa.string()),
    ]
)


@dataclass
class Totals:
    """Counts over shards: `shards`, the sum of their `generations`, rows, and rows by reason and by best label.

    `skipped` counts members of tars that are no images.
    """

    shards: int = 0
    generations: int = 0
    rows_in: int = 0
    rows_tagged: int = 0
    rows_rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, record: Mapping[str, Any], sign: int = 1) -> None:
        """Add a commit record, or subtract it if `sign` is -1."""
        self.shards += sign
        self.generations += sign * record.get("generation", 0)
        for name in ("rows_in", "rows_tagged", "rows_rejected"):
            setattr(self, name, getattr(self, name) + sign * record[name])
        for name in ("reasons", "labels", "skipped"):
            counter = getattr(self, name)
            for key, count in record.get(name, {}).items():
                counter[key] += sign * count

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add the totals of a ledger."""
        for name, value in other.items():
            mine = getattr(self, name)
            if isinstance(mine, Counter):
                for key, count in value.items():
                    mine[key] += count
            else:
                setattr(self, name, mine + value)

    def as_dict(self) -> dict[str, Any]:
        """Return the totals as a dictionary that JSON can hold, without counts of 0."""
        return {
            name: {key: count for key, count in value.items() if count} if isinstance(value, dict) else value
            for name, value in vars(self).items()
        }


def encode_ledger(rows: Sequence[Mapping[str, Any]], totals: Totals) -> bytes:
    """Return the content of a ledger that is written now, has these rows, and adds these totals."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    about = {"version": LEDGER_VERSION, "sealed_at": time, "totals": totals.as_dict()}
    schema = _SCHEMA.with_metadata({_KEY: json.dumps(about, ensure_ascii=False).encode()})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def read_totals(output: Output, entries: Iterable[Entry]) -> Totals:
    """Add up what some ledgers add to the totals of an output."""
    totals = Totals()
    for entry, data in read_ahead(output.store, entries):
        totals.merge(read_about(entry.uri, data)["totals"])
    return totals


def read_about(uri: str, data: bytes) -> dict[str, Any]:
    """Return a ledger's metadata. Raises `StoreError` if it is damaged, or of another version."""
    with damage_of(uri):
        about: dict[str, Any] = json.loads(pq.read_schema(pa.BufferReader(data)).metadata[_KEY])
        if about["version"] == LEDGER_VERSION:
            Totals().merge(about["totals"])
            datetime.fromisoformat(about["sealed_at"])
            return about
    raise StoreError(f"{uri} was written by another version of Sightline: install that version or a later one")


@contextmanager
def damage_of(uri: str) -> Iterator[None]:
    """Raise what reading a damaged ledger raises as `StoreError`."""
    try:
        yield
    except (pa.ArrowException, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{uri} is damaged: {error}") from error
