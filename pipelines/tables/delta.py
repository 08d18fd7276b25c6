"""Delta Lake: a table over `data/` and one over `rejects/`, each with its log in the folder `_delta_log` there.

The files stay where they are; the log names them. A transaction has the number of ledgers that the table is then at, by
Delta's own means for that: an application's id with a version. It is looked at before each transaction. One that
another process commits meanwhile with this id is a conflict, and then everything is looked at once more. So a file
is never added a second time, whoever is killed and whenever. A second id has a digest of these ledgers: an output that
was made anew or restored in the same place has other ones, be they as many.

A table that another program has changed so that a transaction would mean something else is refused: with deletion
vectors, a file that the table names has rows that count no more.

This module is the only one that calls `deltalake`.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pyarrow as pa

from pipelines.output.ledger import Ledger
from pipelines.output.output import Output
from pipelines.tables.changes import TOGETHER, Changes, compare_files, list_files
from pipelines.upkeep.merging import KINDS, Kind
from storage.object_store import make_rust_options
from storage.settings import ConfigError
from storage.store import StoreError, show

if TYPE_CHECKING:
    from deltalake import DeltaTable

APP = "sightline"
"""The id of the application in the table's transactions. Their version is the number of ledgers."""
MARK = "sightline-ledgers"
"""The id whose version is a digest of the ledgers."""
_ATTEMPTS = 20
"""Transactions that are tried while other processes commit theirs."""
_PROPERTIES = {
    # The log is read from the last checkpoint on. Of a million files, one has 35 MB and takes 2.5 s.
    "delta.checkpointInterval": "10",
    # VACUUM deletes files of the folder that are not in the table and older than this. Files that were committed and
    # could not be published yet are such files. The default is a week.
    "delta.deletedFileRetentionDuration": "interval 365 days",
}


_WRITER = 4
"""The highest version of writers for which a transaction of added and removed files is a whole one. From 7 on, a table
names the features that its writers need."""
_FEATURES = frozenset(["appendOnly", "invariants", "changeDataFeed"])


def import_deltalake() -> Any:
    """Return the module `deltalake`. Raises `ConfigError`, which says what to install, if it is not there."""
    try:
        import deltalake
        import deltalake.transaction
    except ImportError as error:
        raise ConfigError("a Delta table needs the package deltalake: pip install 'sightline[delta]'") from error
    return deltalake


def check_uri(uri: str) -> None:
    """Raise `ConfigError` if deltalake cannot read a table at this URI: it decodes each `%20` of a name twice."""
    if found := re.search(r"%[0-9a-fA-F]{2}|[\\\x00-\x1f\x7f]", uri):
        shown = found[0] if found[0].isprintable() else "a control character"
        raise ConfigError(f"{show(uri)}: no Delta table can lie under a name with {shown}: rename the folder")


class DeltaTables:
    """The Delta tables of an output. `schemas` are the columns of each. Every method raises `StoreError`.

    `ConfigError` is raised if `deltalake` is not installed, or for an output's name that it cannot take.
    """

    name = "the Delta table"

    def __init__(self, output: Output, schemas: dict[Kind, pa.Schema]) -> None:
        check_uri(output.uri)
        self._deltalake = import_deltalake()
        self._output, self._schemas = output, schemas
        self._options = make_rust_options(output.uri, output.options)

    def prepare(self) -> None:
        """Make the tables that are not there yet, without files."""
        for kind in KINDS:
            self._open(kind) or self._create(kind)

    def is_current(self, ledger: Ledger) -> bool:
        """Tell whether both tables are at the state of these ledgers, as far as their own notes say."""
        tables = [self._open(kind) for kind in KINDS]
        return all(table is not None and _read_state(table) == (ledger.count, ledger.marks[-1]) for table in tables)

    def explain_unreadable(self) -> list[str]:
        """Say which columns keep a reader from a table: none, since readers take the columns that the table has."""
        return []

    def publish(self, ledger: Ledger, *, compare: bool = False) -> tuple[int, int]:
        """Bring both tables to the state of the ledgers. Return how many files were added, and how many removed.

        With `compare`, tables that are at this state by their own notes are compared with it too. A row that was
        retried is in both tables for a moment. Memory: the names of all files of a table, 1.2 GiB for a million.
        """
        counts = [self._publish_kind(kind, ledger, compare) for kind in KINDS]
        return sum(added for added, _ in counts), sum(removed for _, removed in counts)

    def _publish_kind(self, kind: Kind, ledger: Ledger, compare: bool) -> tuple[int, int]:
        wanted: pa.Table | None = None
        added = removed = conflicts = 0
        while conflicts < _ATTEMPTS:
            table = self._open(kind) or self._create(kind)
            published, mark = _read_state(table)
            if published > ledger.count:  # by a run whose ledgers were not there yet when these were read
                ledger.refresh()
                wanted = None
            noted = (published, mark) == (ledger.count, ledger.marks[-1])
            if noted and not compare:
                return added, removed
            with _errors(self._uri(kind)):
                present = pa.table(table.get_add_actions(flatten=True))["path"]
            wanted = list_files(ledger, kind) if wanted is None else wanted
            moved = ledger.marks[published : published + 1] == [mark] and not noted and all(ledger.moves[published:])
            changes, last = compare_files(wanted, present, moved).take(TOGETHER)
            if noted and not len(changes.added) and not len(changes.removed):
                return added, removed
            state = (ledger.count, ledger.marks[-1]) if last else (published, mark)
            if self._commit(kind, table, changes, state):
                added, removed = added + len(changes.added), removed + len(changes.removed)
                if last:
                    return added, removed
            else:
                time.sleep(random.uniform(0, 0.05 * 2 ** min(conflicts, 5)))
                conflicts += 1
        raise StoreError(f"{self._uri(kind)}: other processes committed to the table {_ATTEMPTS} times meanwhile")

    def _commit(self, kind: Kind, table: DeltaTable, changes: Changes, state: tuple[int, str]) -> bool:
        """Commit one transaction, after which the table is at `state`: a number of ledgers and their digest.

        Returns False if another process has committed one meanwhile.
        """
        actions = self._deltalake.transaction
        now = int(time.time() * 1000)
        columns = (changes.added[name].to_pylist() for name in ("path", "rows", "bytes"))
        wanted: list[Any] = [
            actions.AddAction(path, size, {}, now, not changes.moved, f'{{"numRecords":{rows}}}')
            for path, rows, size in zip(*columns, strict=True)
        ]
        wanted += [actions.RemoveAction(path, not changes.moved, now) for path in changes.removed.to_pylist()]
        notes = [actions.Transaction(APP, state[0]), actions.Transaction(MARK, _encode_mark(state[1]))]
        properties = actions.CommitProperties(app_transactions=notes)
        try:
            with _errors(self._uri(kind)):
                table.create_write_transaction(wanted, "append", table.schema(), commit_properties=properties)
        except _Conflict:
            return False
        return True

    def _open(self, kind: Kind) -> DeltaTable | None:
        """Return the table at its last version, or None if there is none. Raises `StoreError` for one that is not as
        it was made.
        """
        hint = "; if its log is damaged, delete its folder _delta_log, and `sightline publish` makes it anew"
        with _errors(self._uri(kind), hint):
            try:
                table: DeltaTable = self._deltalake.DeltaTable(self._uri(kind), storage_options=self._options)
            except self._deltalake.exceptions.TableNotFoundError:
                return None
            fault = _find_fault(table, self._deltalake.Schema.from_arrow(self._schemas[kind]))
        if fault:
            raise StoreError(
                f"the Delta table {self._uri(kind)} was changed by another program: {fault}: delete its folder "
                "_delta_log, and run `sightline publish`, which makes it anew"
            )
        return table

    def _create(self, kind: Kind) -> DeltaTable:
        """Make an empty table, or return the one that another process has made meanwhile."""
        with _errors(self._uri(kind)):
            try:
                table: DeltaTable = self._deltalake.DeltaTable.create(
                    self._uri(kind),
                    self._deltalake.Schema.from_arrow(self._schemas[kind]),
                    mode="error",
                    description=f"{kind} of {self._output.uri}",
                    configuration=_PROPERTIES,
                    storage_options=self._options,
                )
                return table
            except self._deltalake.exceptions.DeltaError:
                if (made := self._open(kind)) is None:
                    raise
                return made

    def _uri(self, kind: Kind) -> str:
        uri = self._output.uri_of(kind)
        scheme, _, path = uri.rpartition("://")
        return f"{scheme or 'file'}://{quote(path)}"  # names are literal here, and deltalake decodes a %20


class _Conflict(Exception):
    """Another process has committed a transaction meanwhile."""


def _read_state(table: DeltaTable) -> tuple[int, str]:
    """The number of ledgers that a table is at, and their digest, which is "" in a table of an earlier version."""
    with _errors(table.table_uri):
        mark = table.transaction_version(MARK)
        return table.transaction_version(APP) or 0, "" if not mark else f"{mark:015x}"


def _encode_mark(mark: str) -> int:
    """A digest as a version, which has 63 bits: 0 for the digest of no ledger."""
    return int(mark or "0", 16)


def _find_fault(table: DeltaTable, wanted: Any) -> str:
    """Say why files cannot simply be added to a table and removed from it, or return ""."""
    protocol, about = table.protocol(), table.metadata()
    features = protocol.writer_features
    if protocol.min_reader_version != 1:
        needed = protocol.reader_features or [f"version {protocol.min_reader_version}"]
        return f"its readers need {', '.join(map(str, needed))}"
    if protocol.min_writer_version > _WRITER and not (features and _FEATURES.issuperset(features)):
        needed = sorted({*map(str, features or ())} - _FEATURES) or [f"version {protocol.min_writer_version}"]
        return f"its writers need {', '.join(needed)}"
    if about.partition_columns:
        return f"it is partitioned by {', '.join(about.partition_columns)}"
    types = {one["name"]: one["type"] for one in json.loads(table.schema().to_json())["fields"]}
    for one in json.loads(wanted.to_json())["fields"]:
        if types.get(one["name"]) != one["type"]:
            return f"the column {one['name']!r} is not there, or has another type"
    return ""


@contextmanager
def _errors(uri: str, hint: str = "") -> Iterator[None]:
    """Raise what deltalake raises as `StoreError`, with the first line of its message: others are a backtrace."""
    from deltalake.exceptions import CommitFailedError, DeltaError

    try:
        yield
    except CommitFailedError as error:
        raise _Conflict from error
    except (DeltaError, OSError, ValueError, RuntimeError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise StoreError(f"the Delta table {uri} cannot be used: {line[:400]}{hint}") from error
