"""Ledgers: Parquet files that list the committed shards of an output with their files.

A commit record makes a shard committed. To read a million of them, one by one, takes minutes on a disk and more than an
hour from S3. So a run *seals* the shards that it committed: it writes their records' content into the next ledger,
`ledger/000000.parquet` and so on, which is written once and never changed. To know an output's state, read its ledgers
in order; a later row about a shard replaces all earlier ones. Only records that are not sealed yet are read one by one.

A ledger has one row for each file of a shard: a file may hold the rows of several shards, so a row also has the
`first` row of the shard in the file. A shard without rows has one row, whose `kind` is `none`. The metadata of the
file holds what the ledger adds to the totals of the output.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.output.output import Output, owner_of, parse_shard, shard_id
from pipelines.output.row_files import RowFile, dump_files, list_files, make_row_file
from pipelines.output.totals import Totals, damage_of, encode_ledger, read_about
from storage.files import read_ahead
from storage.store import Entry, StoreError

if TYPE_CHECKING:
    from pipelines.planning.plan import ShardRef

_STATE = ["segment", "number", "generation"]


@dataclass(frozen=True)
class _Commit:
    """A shard that is to be sealed: its `generation`, the `files` that this generation wrote, and its reject reasons.

    `keeps` is true if the data files of the sealed generation stay.
    """

    generation: int
    files: list[RowFile]
    reasons: str | None
    keeps: bool


class _SegmentState:
    """The sealed shards of a segment: for each its `generation`, or -1, and the number of the `ledger` that counts."""

    def __init__(self) -> None:
        self.generation = np.zeros(0, np.int16)
        self.ledger = np.zeros(0, np.int32)

    def set(self, numbers: NDArray[np.int32], generations: NDArray[np.int16], ledger: int) -> bool:
        """Take up rows of a ledger. Return whether one of the shards was sealed before."""
        if len(numbers) and numbers.max() >= len(self.generation):
            more = max(int(numbers.max()) + 1, 2 * len(self.generation)) - len(self.generation)
            self.generation = np.r_[self.generation, np.full(more, -1, np.int16)]
            self.ledger = np.r_[self.ledger, np.full(more, -1, np.int32)]
        sealed = bool((self.generation[numbers] >= 0).any())
        self.generation[numbers], self.ledger[numbers] = generations, ledger
        return sealed


class Ledger:
    """The sealed shards of an output. Memory holds six bytes for each of them.

    `totals` are those of all sealed shards, and `count` is the number of ledgers. Add commit records, and `seal` them.
    """

    def __init__(self, output: Output) -> None:
        self.totals = Totals()
        self.count = 0
        self.times: list[str] = []
        """When each ledger was sealed, in UTC, as ISO 8601."""
        self.moves: list[bool] = []
        """Whether each ledger is a compaction's: its rows say where images lie, and are about no new ones."""
        self.marks: list[str] = [""]
        """For each number of ledgers, a digest of their content, of 15 hexadecimal digits; "" without a ledger. An
        output that was made anew, or restored, may have as many ledgers as before, but not these."""
        self.replacing = -1
        """The number of the last ledger with a row about a shard that an earlier ledger has too, or -1."""
        self.replaced: set[str] = set()
        """Files of which a ledger of this run replaced rows. Manifests that were written before lead to them."""
        self._output = output
        self._segments: dict[int, _SegmentState] = {}
        self._waiting: dict[str, _Commit] = {}
        self._added = Totals()
        self._replaced: set[str] = set()

    @classmethod
    def read(cls, output: Output, count: int | None = None) -> Ledger:
        """Read an output's ledgers: all of them, or the first `count`, as a manifest names them."""
        ledger = cls(output)
        ledger.refresh(count)
        return ledger

    def refresh(self, count: int | None = None) -> None:
        """Read the ledgers that were written since the last call. Raises `StoreError` if one is missing or damaged."""
        entries = list_ledgers(self._output)[: count if count is None else max(count, 0)]
        if count is not None and len(entries) < count:
            raise StoreError(f"{self._output.uri}: manifest.json names {count} ledgers, and there are {len(entries)}")
        for number, entry in enumerate(entries):
            if entry.uri != self._output.uri_of(ledger_path(number)):
                uri = self._output.uri_of(ledger_path(number))
                raise StoreError(f"{uri} is missing: ledgers are part of the output")
        for _, data in read_ahead(self._output.store, entries[self.count :]):
            self._apply(data)

    def generation_of(self, shard: str) -> int:
        """The sealed generation of a shard, or -1."""
        segment, number = parse_shard(shard)
        state = self._segments.get(segment)
        return int(state.generation[number]) if state is not None and number < len(state.generation) else -1

    def generations(self, segment: int, shards: int) -> NDArray[np.int16]:
        """The sealed generations of a segment's shards, int16 (S,): -1 for those that are not sealed."""
        found = np.full(shards, -1, np.int16)
        if segment in self._segments:
            known = self._segments[segment].generation[:shards]
            found[: len(known)] = known
        return found

    def add(self, record: Mapping[str, Any]) -> None:
        """Take up a commit record, to be sealed. A generation that is sealed already is ignored."""
        shard, generation = record["shard"], record.get("generation", 0)
        sealed = self.generation_of(shard)
        before = self._waiting[shard].generation if shard in self._waiting else sealed
        if generation <= before:
            return
        before_record = self._output.read_commit(shard, before) if before >= 0 else None
        self._added.add(record)
        if before_record is not None:
            self._added.add(before_record, -1)
        files, keeps = self._split_files(record)
        reasons = json.dumps(record["reasons"], ensure_ascii=False) if record["reasons"] else None
        self._waiting[shard] = _Commit(generation, files, reasons, keeps)

    def files_of(self, record: Mapping[str, Any]) -> list[RowFile]:
        """Return the files of a shard whose commit record is not sealed: those that the next ledger will name."""
        files, keeps = self._split_files(record)
        kept = self.find_files([record["shard"]])[record["shard"]] if keeps else []
        return [*(file for file in kept if file.kind == "data"), *files]

    def _split_files(self, record: Mapping[str, Any]) -> tuple[list[RowFile], bool]:
        """Return the files of a record that are new, and whether the data files of the sealed generation stay.

        The ledger has those, which may have been merged since. They stay if the record names some of them: a retry
        keeps them, and a retagging writes all rows anew.
        """
        sealed = self.generation_of(record["shard"])
        new, keeps = [], False
        for file in list_files(record):
            if sealed < 0 or ((owner := owner_of(file.path)) is not None and owner[1] > sealed):
                new.append(file)
            else:
                keeps |= file.kind == "data"
        return new, keeps

    @property
    def added(self) -> Totals:
        """What the shards that are to be sealed add to `totals`."""
        return self._added

    @property
    def waiting(self) -> int:
        """The number of shards that are to be sealed."""
        return len(self._waiting)

    def seal(self) -> set[str]:
        """Write the records that were added to the next ledger. Return the names of the shards.

        If another run writes a ledger at the same time, what it has sealed is left out, and the rest is written to the
        one after.
        """
        shards = set(self._waiting)
        while self._waiting:
            data = encode_ledger(list(self._make_rows()), self._added)
            if self._output.put_if_absent(ledger_path(self.count), data):
                self.replaced |= self._replaced
                self._waiting, self._added = {}, Totals()
                self._apply(data)
                break
            self._restart()
        return shards

    def replace_files(self, kind: str, merged: Mapping[str, Sequence[RowFile]], replaced: Collection[str]) -> bool:
        """Write a ledger in which merged files take the place of others. Return False if that is not possible any more.

        `merged` are the new files of each shard, of one kind, and `replaced` the paths of the files that they replace.
        If another run has sealed one of the shards meanwhile, nothing is written.
        """
        ledgers = {shard: self._ledger_of(shard) for shard in merged}
        rows = []
        told: dict[str, dict[str, Any]] = {}
        for number, table in self._read(sorted(set(ledgers.values()))):
            for row in table.to_pylist():
                shard = shard_id(row["segment"], row["number"])
                if ledgers.get(shard) == number:
                    if row["kind"] == kind and row["path"] in replaced:
                        told[shard] = row
                    else:
                        rows.append(row)
        for shard, files in merged.items():
            rows += [{**told[shard], **asdict(file)} for file in files]
        rows.sort(key=lambda row: (row["segment"], row["number"]))
        data = encode_ledger(rows, Totals())
        while not self._output.put_if_absent(ledger_path(self.count), data):
            self.refresh()
            if any(self._ledger_of(shard) != number for shard, number in ledgers.items()):
                return False
        self._apply(data)
        self.replaced |= set(replaced)
        return True

    def list_files(self, kinds: Sequence[str] = ("data", "rejects"), first: int = 0) -> Iterator[tuple[str, RowFile]]:
        """Yield the files of the shards that were sealed from ledger `first` on, each with the name of its shard.

        They come in the order of the ledgers, and the files of a shard one after the other.
        """
        for table in self.read_tables(kinds, first):
            for batch in table.to_batches(4096):
                for row in batch.to_pylist():
                    yield shard_id(row["segment"], row["number"]), make_row_file(row)

    def read_tables(
        self,
        kinds: Sequence[str] = ("data", "rejects"),
        first: int = 0,
        segments: Collection[int] | None = None,
        *,
        replaced: bool = False,
    ) -> Iterator[pa.Table]:
        """Yield the rows that count of each ledger from number `first` on, with the columns of a ledger.

        With `segments`, only the rows about their shards, from the ledgers that have some. With `replaced`, also the
        rows that a later ledger replaces.
        """
        wanted: Sequence[int] = range(first, self.count)
        if segments is not None:
            states = [self._segments[segment].ledger for segment in segments if segment in self._segments]
            numbers = np.unique(np.concatenate([np.zeros(0, np.int32), *states])).tolist()
            wanted = [number for number in numbers if number >= first]
        for number, table in self._read(wanted):
            chosen = pc.is_in(table["kind"], pa.array([*kinds]))
            if not replaced:
                chosen = pc.and_(chosen, pa.array(self._counts(table, number)))
            if segments is not None:
                chosen = pc.and_(chosen, pc.is_in(table["segment"], pa.array([*segments], pa.int32())))
            yield table.filter(chosen)

    def with_files(self, refs: Sequence[ShardRef]) -> list[ShardRef]:
        """Return references to shards, those of later generations with the shard's files."""
        found = self.find_files(ref.shard for ref in refs if ref.generation)
        return [replace(ref, files=dump_files(found[ref.shard])) if ref.generation else ref for ref in refs]

    def find_files(self, shards: Iterable[str]) -> dict[str, list[RowFile]]:
        """Return the files of some sealed shards. Reads only the ledgers that have them."""
        ledgers: dict[int, set[str]] = {}
        for shard in shards:
            ledgers.setdefault(self._ledger_of(shard), set()).add(shard)
        found: dict[str, list[RowFile]] = {shard: [] for names in ledgers.values() for shard in names}
        for number, table in self._read(sorted(ledgers)):
            for row in table.to_pylist():
                shard = shard_id(row["segment"], row["number"])
                if shard in ledgers[number] and row["kind"] != "none":
                    found[shard].append(make_row_file(row))
        return found

    def _ledger_of(self, shard: str) -> int:
        """The number of the ledger that counts for a sealed shard."""
        segment, number = parse_shard(shard)
        return int(self._segments[segment].ledger[number])

    def _read(self, numbers: Sequence[int]) -> Iterator[tuple[int, pa.Table]]:
        """Yield ledgers with their rows."""
        entries = [Entry(self._output.uri_of(ledger_path(number)), 0, "") for number in numbers]
        for number, (_, data) in zip(numbers, read_ahead(self._output.store, entries), strict=True):
            yield number, pq.read_table(pa.BufferReader(data))

    def _counts(self, table: pa.Table, number: int) -> NDArray[np.bool_]:
        """Tell which rows of a ledger no later ledger replaces, bool (N,)."""
        segments, numbers = table["segment"].to_numpy(), table["number"].to_numpy()
        counts = np.zeros(len(segments), np.bool_)
        for segment in np.unique(segments):
            rows = segments == segment
            counts[rows] = self._segments[int(segment)].ledger[numbers[rows]] == number
        return counts

    def _make_rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the next ledger."""
        kept = self.find_files(shard for shard in self._waiting if self.generation_of(shard) >= 0)
        self._replaced = {file.path for files in kept.values() for file in files}
        for shard, commit in sorted(self._waiting.items()):
            segment, number = parse_shard(shard)
            about = {"segment": segment, "number": number, "generation": commit.generation}
            files = [*(file for file in kept.get(shard, ()) if commit.keeps and file.kind == "data"), *commit.files]
            for file in files:
                reasons = commit.reasons if file.kind == "rejects" else None
                yield {**about, "kind": file.kind, **asdict(file), "reasons": reasons}
            if not files:
                yield {**about, "kind": "none", "first": 0, "rows": 0, "bytes": 0}

    def _restart(self) -> None:
        """Read what another run has sealed, and take up the records that are still to be sealed once more."""
        waiting, self._waiting, self._added = self._waiting, {}, Totals()
        self.refresh()
        for shard, commit in waiting.items():
            self.add(self._output.read_commit(shard, commit.generation))

    def _apply(self, data: bytes) -> None:
        uri = self._output.uri_of(ledger_path(self.count))
        about = read_about(uri, data)
        with damage_of(uri):
            table = pq.read_table(pa.BufferReader(data), columns=_STATE)
            segments, numbers, generations = (table[name].to_numpy() for name in _STATE)
        self.totals.merge(about["totals"])
        self.times.append(about["sealed_at"])
        self.moves.append(about["totals"] == Totals().as_dict())
        for segment in np.unique(segments):
            rows = segments == segment
            state = self._segments.setdefault(int(segment), _SegmentState())
            if state.set(numbers[rows], generations[rows], self.count):
                self.replacing = self.count
        self.marks.append(hashlib.sha256(self.marks[-1].encode() + data).hexdigest()[:15])
        self.count += 1


def ledger_path(number: int) -> str:
    """Return the path of a ledger in the output."""
    return f"ledger/{number:06d}.parquet"


def list_ledgers(output: Output) -> list[Entry]:
    """Return the ledgers of an output, in order."""
    found = (entry for entry in output.store.list(output.uri_of("ledger")) if entry.uri.endswith(".parquet"))
    return sorted(found, key=lambda entry: entry.uri)
