"""Retrying rejected rows: which rows of a committed shard are read again, and with which row numbers.

Rows of a shard are numbered in reading order. When some of its inputs are read again, each row is looked up in the
shard's own files: by source and key, the first of a key before the second, and tagged rows by the digest of their bytes
too. So it does no harm when a newer version, or another installation, finds more images in a tar, or names some of them
in another way. Rows that were not there at the first reading, such as those of a tar that was missing, get new numbers
after all others. The first of them gets the number of the archive's own reject row, which it replaces.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.inputs.formats import ARCHIVES, read_inputs
from pipelines.inputs.rows import Input, Reading, Row, Skipped
from pipelines.inputs.samples import split_name
from pipelines.output.commit import with_current_files
from pipelines.output.ledger import Ledger
from pipelines.output.output import Output
from pipelines.output.row_files import load_files, read_rows
from pipelines.planning.plan import Plan, ShardRef
from storage.store import Changed, NotFound, StoreError

STAY = "rejected rows that were not found again (they stay rejected)"
"""The phrase of `Skipped` for rows that were to be retried, and were not among the rows that were read."""
STAY_CHANGED = "rejected rows whose input has changed since it was planned (they stay rejected)"
"""The phrase for rows of another version than the one that is there now. That version can never be read again."""


class _Index:
    """Finds rows by a 64-bit digest, in the order of row numbers. 20 bytes for each row."""

    def __init__(self, ids: NDArray[np.uint64]) -> None:
        self._order = np.argsort(ids, kind="stable")
        self._ids = ids[self._order]
        self._passed = np.zeros(len(ids), np.int32)  # at a digest's first place: how many of its first rows are taken

    def find(self, digest: int, taken: NDArray[np.bool_]) -> Iterator[int]:
        """Yield the rows with this digest that are not taken."""
        first = place = int(np.searchsorted(self._ids, np.uint64(digest)))
        while place < len(self._ids) and self._ids[place] == digest:
            passed = int(self._passed[first])
            if place < first + passed:
                place = first + passed
                continue
            row = int(self._order[place])
            if not taken[row]:
                yield row
            elif place == first + passed:
                self._passed[first] += 1
            place += 1


@dataclass
class Retry:
    """The rows of a committed shard, each at the place of its number in arrays, and which of them are retried.

    `keys` are digests of source and key, `sources` of the source, and `contents` of source and image: 0 for a rejected
    row. `wanted` marks the rows that are retried, and `uris` are the sources of these. `rows_in` is the number of rows
    in the shard. It grows when a retry finds rows that were not there before. `skipped` are the counts of the shard's
    commit record.
    """

    keys: NDArray[np.uint64]
    sources: NDArray[np.uint64]
    contents: NDArray[np.uint64]
    wanted: NDArray[np.bool_]
    uris: set[str]
    rows_in: int
    skipped: Mapping[str, int]


def list_retries(ledger: Ledger, plan: Plan, reasons: Collection[str]) -> Iterator[ShardRef]:
    """Yield the sealed shards that have rows rejected for one of the reasons, as shards to process.

    Without reasons, every rejected row counts. Each shard has the generation after the sealed one. Its `files` are not
    filled in: see `Ledger.with_files`.
    """
    segments = {segment.number: segment for segment in plan.segments}
    for table in ledger.read_tables(["rejects"]):
        told: dict[tuple[int, int], tuple[int, str]] = {}  # a shard may have several reject files
        for row in table.to_pylist():
            told[row["segment"], row["number"]] = row["generation"], row["reasons"]
        for (segment, number), (generation, text) in told.items():
            counts: dict[str, int] = json.loads(text)
            rows = sum(count for reason, count in counts.items() if not reasons or reason in reasons)
            if rows and segment in segments:
                yield replace(segments[segment].ref(number), rows=rows, generation=generation + 1)


def find_retry(output: Output, ref: ShardRef, reasons: Collection[str]) -> Retry:
    """Look up which rows of a shard are to be retried: those rejected for one of the reasons, or all rejected rows.

    Raises `StoreError` if the shard's files do not hold each of its rows once.
    """
    try:
        return _look_up(output, ref, reasons)
    except NotFound:
        current = with_current_files(output, ref)
        if current is None:
            raise
        return _look_up(output, current, reasons)


def _look_up(output: Output, ref: ShardRef, reasons: Collection[str]) -> Retry:
    record = output.read_commit(ref.shard, ref.generation - 1)
    count = record["rows_in"]
    files = load_files(ref.files)
    keys, sources, contents = (np.zeros(count, np.uint64) for _ in range(3))
    wanted, known = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    uris: set[str] = set()
    for file in files:
        rejects = file.kind == "rejects"
        for rows in read_rows(output, file, ["row", "source", "key", "reason" if rejects else "sha256"]):
            numbers = rows["row"].to_numpy()
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < count:
                raise StoreError(f"{output.uri_of(file.path)} has rows beyond the {count} of its shard: run verify")
            named = rows["source"].to_pylist()
            known[numbers] = True
            sources[numbers] = [_digest(source) for source in named]
            keys[numbers] = [_digest(*pair) for pair in zip(named, rows["key"].to_pylist(), strict=True)]
            if rejects:
                chosen = pc.is_in(rows["reason"], pa.array(reasons, pa.string())) if reasons else None
                wanted[numbers] = True if chosen is None else chosen.to_numpy(zero_copy_only=False)
                uris.update(source for source, number in zip(named, numbers, strict=True) if wanted[number])
            else:
                contents[numbers] = [_digest(*pair) for pair in zip(named, rows["sha256"].to_pylist(), strict=True)]
    if not known.all():
        raise StoreError(f"shard {ref.shard} has {int(known.sum())} of its {count} rows in its files: run verify")
    return Retry(keys, sources, contents, wanted, uris, count, record.get("skipped", {}))


def read_retried(
    planned: Sequence[Input], retry: Retry, reading: Reading, skipped: Skipped
) -> Iterator[tuple[int, Row]]:
    """Yield the rows that are retried, with their row numbers.

    Rows to be retried that are not read again, such as those of an archive that is gone now, are not yielded, so that
    they stay rejected. They are counted in `skipped`. So are the rows of an input that has changed, whatever
    `on_changed` says: its new version is another input, which waits or is tagged as such. If all archives of the shard
    are read again, their other members are counted there too, and a phrase that no member has any more is counted 0.
    Else the earlier counts hold.

    The rows of lists are told by their URI and their place among the rows with this URI, and by no digest: what a URL
    gives may be another image each time. Those of them that are not retried are not read.

    Raises `StoreError` as reading does, and `Changed` if an input has rows that were not there before and lacks others
    that were tagged: they may be the same images, which would be tagged twice.
    """
    aligner = _Aligner(retry)
    inputs, listed = aligner.choose(item for item in planned if item.uri in retry.uris)
    counted = Skipped()
    for item, row in read_inputs(inputs, replace(reading, on_changed="retag"), counted):
        number = aligner.number(item, row) if id(item) not in listed else listed[id(item)]
        if number is not None:
            yield number, row
    aligner.check()
    if not aligner.is_partial and all(item.uri in retry.uris for item in planned if item.kind in ARCHIVES):
        skipped.counts.update(dict.fromkeys(retry.skipped, 0) | dict(counted.counts))
    skipped.counts[STAY], skipped.counts[STAY_CHANGED] = aligner.count_left()


class _Aligner:
    """Gives each row that is read again its number: that of the same row before, or else a new one."""

    def __init__(self, retry: Retry) -> None:
        self.is_partial = False
        """Whether an archive could not be read now, so that it has the rows that it had."""
        self._retry = retry
        self._taken = np.zeros(retry.rows_in, np.bool_)
        self._seen = np.zeros(retry.rows_in, np.bool_)  # taken, and not by a row that was rejected as it was read
        self._by_key = _Index(retry.keys)
        self._moved: set[tuple[int, int]] = set()  # keys and contents of tagged rows that were found by content alone
        self._grown: set[int] = set()  # sources with new rows
        self._changed: set[int] = set()  # sources of which another version is there now
        self._yielded = array("Q")  # contents of the rows that are retried

    def choose(self, planned: Iterable[Input]) -> tuple[list[Input], dict[int, int]]:
        """Return the inputs to read, and the numbers of the rows of those that are rows of lists, by their `id`."""
        chosen: list[Input] = []
        listed: dict[int, int] = {}
        for item in planned:
            if item.kind == "uri":
                found = next(self._by_key.find(_digest(item.uri, item.key), self._taken), None)
                if found is not None:
                    self._taken[found] = self._seen[found] = True
                    if not self._retry.wanted[found]:
                        continue
                    listed[id(item)] = found
            chosen.append(item)
        return chosen, listed

    @cached_property
    def _by_content(self) -> _Index:
        return _Index(self._retry.contents)

    def number(self, item: Input, row: Row) -> int | None:
        """Return the number of a row, or None for one that is not retried."""
        retry = self._retry
        if row.key == item.key and row.rejected is not None and row.rejected.reason == "changed":
            self._changed.add(_digest(item.uri))
            self.is_partial = True
            return None
        if item.kind in ARCHIVES and self._is_gone(item, row):
            self.is_partial = True
            return None
        content = 0 if row.sha256 is None else _digest(row.source, row.sha256)
        found = self._find_same(row, content)
        if found is None:
            self._grown.add(_digest(row.source))
            found = self._find_replaced(item, row)
        if found is not None:
            self._taken[found] = True
            self._seen[found] = bool(content)
            if not retry.wanted[found]:
                return None
        if content:
            self._yielded.append(content)
        if found is None:
            found = retry.rows_in
            retry.rows_in += 1
        return found

    def check(self) -> None:
        """Raise `Changed` if an image may be tagged twice."""
        retry = self._retry
        unseen, untaken = (~some & (retry.contents != 0) for some in (self._seen, self._taken))
        for left, values, doubtful in (
            (unseen, retry.contents, self._yielded),
            (untaken, retry.sources, array("Q", self._grown)),
        ):
            found = retry.sources[left][np.isin(values[left], np.asarray(doubtful, np.uint64))]
            if len(found):
                raise _misaligned(next(uri for uri in retry.uris if _digest(uri) == found[0]))

    def count_left(self) -> tuple[int, int]:
        """Return how many rows were to be retried and were not read: of inputs that are as planned, and of others."""
        left = self._retry.sources[self._retry.wanted & ~self._taken]
        changed = int(np.isin(left, np.fromiter(self._changed, np.uint64)).sum())
        return len(left) - changed, changed

    def _find_same(self, row: Row, content: int) -> int | None:
        """Return the first row with this key that may be the same, or else the first tagged row with this image."""
        contents, key = self._retry.contents, _digest(row.source, row.key)
        if (key, content) in self._moved:
            raise _misaligned(row.source)
        free = self._by_key.find(key, self._taken)
        found = next((old for old in free if not contents[old] or not content or contents[old] == content), None)
        if found is None and content:
            found = next(self._by_content.find(content, self._taken), None)
            if found is not None:
                self._moved.add((int(self._retry.keys[found]), content))
        return found

    def _find_replaced(self, item: Input, row: Row) -> int | None:
        """Return the rejected row that a new row of an archive replaces, if there is one.

        That is the sample's row, if the sample has more images now and their keys are longer; or the archive's own.
        """
        if item.kind not in ARCHIVES:
            return None
        for name in (split_name(row.key)[0], item.key):
            for old in self._by_key.find(_digest(row.source, name), self._taken):
                if self._retry.wanted[old]:
                    return old
        return None

    def _is_gone(self, item: Input, row: Row) -> bool:
        """Tell whether a row says that the archive is missing now, and some of it was read before.

        Such a row tells nothing of the rows that were read: these are as they were.
        """
        if row.key != item.key or row.rejected is None or row.rejected.reason != "missing":
            return False
        rows = self._retry.sources == np.uint64(_digest(item.uri))
        return bool((self._retry.keys[rows] != np.uint64(_digest(item.uri, item.key))).any())


def _misaligned(uri: str) -> Changed:
    return Changed(
        f"{uri} is read in another way than before: it has new rows, and not all that were tagged; to read it anew, "
        "tag it into another output"
    )


def _digest(source: str, text: str = "") -> int:
    """Return a digest of 64 bits that is not 0."""
    data = f"{len(source)} {source}{text}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1
