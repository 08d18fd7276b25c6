"""Delta Lake: a table over `data/` and one over `rejects/`, each with its log in the folder `_delta_log` there.

The files stay where they are; the log names them. A transaction has the number of ledgers that the table is then at, by
Delta's own means for that: an application's id with a version. It is looked at before each transaction. One that
another process commits meanwhile with this id is a conflict, and then everything is looked at once more. So a file
is never added a second time, whoever is killed and whenever.

This module is the only one that calls `deltalake`.
"""

from __future__ import annotations

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
from storage.store import StoreError

if TYPE_CHECKING:
    from deltalake import DeltaTable

APP = "sightline"
"""The id of the application in the table's transactions. Their version is the number of ledgers."""
_ATTEMPTS = 20
"""Transactions that are tried while other processes commit theirs."""
_PROPERTIES = {
    # The log is read from the last checkpoint on. Of a million files, one has 35 MB and takes 2.5 s.
    "delta.checkpointInterval": "10",
    # VACUUM deletes files of the folder that are not in the table and older than this. Files that were committed and
    # could not be published yet are such files. The default is a week.
    "delta.deletedFileRetentionDuration": "interval 365 days",
}


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
    if found := re.search("%[0-9a-fA-F]{2}", uri):
        raise ConfigError(f"{uri}: no Delta table can lie under a name with {found[0]}: rename the folder")


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

    def count_ledgers(self) -> int:
        """Return the number of ledgers that all tables have. 0 if there is a table that is not there."""
        tables = [self._open(kind) for kind in KINDS]
        return min(0 if table is None else _read_version(table) for table in tables)

    def publish(self, ledger: Ledger) -> tuple[int, int]:
        """Bring both tables to the state of the ledgers. Return how many files were added, and how many removed.

        Tables that are further are left as they are. A row that was retried is in both tables for a moment. Memory: the
        names of all files of a table, 1.2 GiB for a million.
        """
        counts = [self._publish_kind(kind, ledger) for kind in KINDS]
        return sum(added for added, _ in counts), sum(removed for _, removed in counts)

    def _publish_kind(self, kind: Kind, ledger: Ledger) -> tuple[int, int]:
        wanted: pa.Table | None = None
        added = removed = conflicts = 0
        while conflicts < _ATTEMPTS:
            table = self._open(kind) or self._create(kind)
            published = _read_version(table)
            if published >= ledger.count:
                return added, removed
            with _errors(self._uri(kind)):
                present = pa.table(table.get_add_actions(flatten=True))["path"]
            wanted = list_files(ledger, kind) if wanted is None else wanted
            moved = all(ledger.moves[published:])
            changes, last = compare_files(wanted, present, moved).take(TOGETHER)
            if self._commit(kind, table, changes, ledger.count if last else published):
                added, removed = added + len(changes.added), removed + len(changes.removed)
                if last:
                    return added, removed
            else:
                time.sleep(random.uniform(0, 0.05 * 2 ** min(conflicts, 5)))
                conflicts += 1
        raise StoreError(f"{self._uri(kind)}: other processes committed to the table {_ATTEMPTS} times meanwhile")

    def _commit(self, kind: Kind, table: DeltaTable, changes: Changes, version: int) -> bool:
        """Commit one transaction. Return False if another process has committed one meanwhile."""
        actions = self._deltalake.transaction
        now = int(time.time() * 1000)
        columns = (changes.added[name].to_pylist() for name in ("path", "rows", "bytes"))
        wanted: list[Any] = [
            actions.AddAction(path, size, {}, now, not changes.moved, f'{{"numRecords":{rows}}}')
            for path, rows, size in zip(*columns, strict=True)
        ]
        wanted += [actions.RemoveAction(path, not changes.moved, now) for path in changes.removed.to_pylist()]
        properties = actions.CommitProperties(app_transactions=[actions.Transaction(APP, version)])
        try:
            with _errors(self._uri(kind)):
                table.create_write_transaction(wanted, "append", table.schema(), commit_properties=properties)
        except _Conflict:
            return False
        return True

    def _open(self, kind: Kind) -> DeltaTable | None:
        """Return the table at its last version, or None if there is none."""
        with _errors(self._uri(kind)):
            try:
                table: DeltaTable = self._deltalake.DeltaTable(self._uri(kind), storage_options=self._options)
                return table
            except self._deltalake.exceptions.TableNotFoundError:
                return None

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


def _read_version(table: DeltaTable) -> int:
    with _errors(table.table_uri):
        return table.transaction_version(APP) or 0


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Raise what deltalake raises as `StoreError`, with the first line of its message: others are a backtrace."""
    from deltalake.exceptions import CommitFailedError, DeltaError

    try:
        yield
    except CommitFailedError as error:
        raise _Conflict from error
    except (DeltaError, OSError, ValueError, RuntimeError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise StoreError(f"the Delta table {uri} cannot be used: {line[:400]}") from error
