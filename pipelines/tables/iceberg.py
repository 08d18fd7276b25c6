"""Iceberg: a table for the images and one for the rejected rows, in a catalogue that the user has.

The files stay where they are; the table's own files lie where the catalogue puts them. Its property `sightline.ledgers`
is the number of ledgers that it is at, and `sightline.state` their digest: an output that was made anew or restored in
the same place has other ones, be they as many. Both are changed in the commit that adds the files; the snapshot has the
digest too. If the current snapshot has another one, another program has committed or gone back since, and all files are
compared. A file that is added twice has its rows twice, so no commit may be repeated on another state of the table than
it was made for: pyiceberg's own retries are off, and each attempt looks at the table again.

This module is the only one that calls `pyiceberg`.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines.output.ledger import Ledger
from pipelines.output.output import TABLES, Output
from pipelines.tables.changes import TOGETHER, Changes, compare_files, list_files
from pipelines.tables.mapping import find_unreadable, map_names
from pipelines.tables.names import ICEBERG
from pipelines.upkeep.merging import KINDS, Kind
from storage.schemes import is_remote, scheme_of
from storage.settings import ConfigError
from storage.store import StoreError, show

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import Table

_LEDGERS, _STATE, _OUTPUT = "sightline.ledgers", "sightline.state", "sightline.output"
_RETRIES, _MAPPING = "commit.retry.num-retries", "schema.name-mapping.default"
_ATTEMPTS = 10
"""Commits that are tried while other processes commit theirs."""


def import_pyiceberg() -> Any:
    """Return the module `pyiceberg`. Raises `ConfigError`, which says what to install, if it is not there."""
    try:
        import pyiceberg
        import pyiceberg.catalog
    except ImportError as error:
        raise ConfigError("an Iceberg table needs the package pyiceberg: pip install 'sightline[iceberg]'") from error
    return pyiceberg


def check_place(uri: str) -> None:
    """Raise `ConfigError` for an output that no Iceberg table can name as its readers expect it.

    pyiceberg does not know az://, and reaches gs:// by another interface than `storage.cloud`, which is not tested. It
    reads a name up to a `#` or a `?`, and without line ends and tabs.
    """
    if found := re.search(r"[#?\x00-\x1f\x7f]", uri):
        shown = found[0] if found[0].isprintable() else "a control character"
        raise ConfigError(f"{show(uri)}: no Iceberg table can name files under {shown}: rename the folder")
    scheme = scheme_of(uri)
    if scheme not in (None, "file", "s3"):
        raise ConfigError(
            f"{uri}: an Iceberg table is for an output on a disk or in S3: use the table delta for {scheme}://"
        )


class IcebergTables:
    """The Iceberg tables of an output. `schemas` are the columns of each, and `name` is as `ICEBERG` says. `files` are
    the columns of the files, if there are more.

    The catalogue is one of pyiceberg's configuration, `.pyiceberg.yaml` or environment variables. The rejected rows are
    in a second table, whose name ends with `_rejects`. Every method raises `StoreError`.
    """

    name = "the Iceberg table"

    def __init__(
        self, output: Output, schemas: dict[Kind, pa.Schema], name: str, files: dict[Kind, pa.Schema] | None = None
    ) -> None:
        check_place(output.uri)
        import_pyiceberg()
        found = ICEBERG.fullmatch(name)
        assert found is not None, name
        self._output, self._schemas, self._files = output, schemas, files or schemas
        self._catalog_name, self._namespace = found["catalog"], found["namespace"]
        self._identifiers: dict[Kind, str] = {
            kind: f"{self._namespace}.{found['table']}{'_rejects' if kind == 'rejects' else ''}" for kind in KINDS
        }

    def prepare(self) -> None:
        """Make the tables that are not there yet, without files."""
        catalog = self._connect()
        for kind in KINDS:
            self._open(catalog, kind) or self._create(catalog, kind)

    def is_current(self, ledger: Ledger) -> bool:
        """Tell whether both tables are at the state of these ledgers, and nobody else has committed to them since."""
        catalog = self._connect()
        tables = [self._open(catalog, kind) for kind in KINDS]
        state = ledger.count, ledger.marks[-1]
        return all(
            table is not None and _read_state(table) == state and _is_own(table) and not self._lacks_names(kind, table)
            for kind, table in zip(KINDS, tables, strict=True)
        )

    def explain_unreadable(self) -> list[str]:
        """Say which columns of the files keep pyiceberg from reading the table, though the table is without them."""
        return find_unreadable(self._files["data"], self._schemas["data"])

    def publish(self, ledger: Ledger, *, compare: bool = False) -> tuple[int, int]:
        """Bring both tables to the state of the ledgers. Return how many files were added, and how many removed.

        Files of new ledgers are added without a look at the others. If a ledger replaces rows of earlier ones, if
        another program has committed since, or to `compare`, all files of the table are read from its manifests.
        """
        catalog = self._connect()
        counts = [self._publish_kind(catalog, kind, ledger, compare) for kind in KINDS]
        return sum(added for added, _ in counts), sum(removed for _, removed in counts)

    def _publish_kind(self, catalog: Catalog, kind: Kind, ledger: Ledger, compare: bool) -> tuple[int, int]:
        added = removed = conflicts = 0
        while conflicts < _ATTEMPTS:
            table = self._open(catalog, kind) or self._create(catalog, kind)
            published, mark = _read_state(table)
            if published > ledger.count:  # by a run whose ledgers were not there yet when these were read
                ledger.refresh()
            own = _is_own(table)
            noted = own and (published, mark) == (ledger.count, ledger.marks[-1]) and not self._lacks_names(kind, table)
            if noted and not compare:
                return added, removed
            last = True
            known = own and published > 0 and ledger.marks[published : published + 1] == [mark]
            if known and not compare and ledger.replacing < published:
                files = list_files(ledger, kind, published)
                changes = compare_files(files, pa.chunked_array([], pa.string()), moved=False)
            else:
                changes = compare_files(list_files(ledger, kind), self._list_present(kind, table), moved=False)
                if not published:  # otherwise what was added in part would be added again
                    changes, last = changes.take(TOGETHER)
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
        raise StoreError(f"{self._identifiers[kind]}: other processes committed to it {_ATTEMPTS} times meanwhile")

    def _commit(self, kind: Kind, table: Table, changes: Changes, state: tuple[int, str]) -> bool:
        """Commit one snapshot, after which the table is at `state`: a number of ledgers and their digest.

        Returns False if another process has committed one meanwhile.
        """
        from pyiceberg.exceptions import CommitFailedException

        try:
            with self._errors(kind), table.transaction() as transaction:
                notes = {_LEDGERS: str(state[0]), _STATE: state[1]}
                properties = dict(notes)
                if self._lacks_names(kind, table):  # the files have no ids of fields
                    mapping = table.name_mapping() or table.schema().name_mapping
                    properties[_MAPPING] = map_names(mapping, self._files[kind]).model_dump_json()
                transaction.set_properties(properties)
                update = transaction.update_snapshot(snapshot_properties=notes)
                if len(changes.removed):
                    with update.overwrite() as overwrite:
                        for path in changes.removed.to_pylist():
                            overwrite.delete_data_file(self._make_file(kind, table, path, 0, 0))
                        self._append(overwrite, kind, table, changes)
                else:  # also without files: a commit of properties alone conflicts with no other one
                    with update.fast_append() as append:
                        self._append(append, kind, table, changes)
        except StoreError as error:
            if isinstance(error.__cause__, CommitFailedException):
                return False
            raise
        return True

    def _append(self, producer: Any, kind: Kind, table: Table, changes: Changes) -> None:
        columns = (changes.added[name].to_pylist() for name in ("path", "rows", "bytes"))
        for path, rows, size in zip(*columns, strict=True):
            producer.append_data_file(self._make_file(kind, table, path, rows, size))

    def _make_file(self, kind: Kind, table: Table, path: str, rows: int, size: int) -> Any:
        from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
        from pyiceberg.typedef import Record

        file = DataFile.from_args(
            content=DataFileContent.DATA,
            file_path=path if "://" in path else f"{self._prefix(kind)}{path}",
            file_format=FileFormat.PARQUET,
            partition=Record(),
            record_count=rows,
            file_size_in_bytes=size,
            column_sizes={},
            value_counts={},
            null_value_counts={},
            nan_value_counts={},
            lower_bounds={},
            upper_bounds={},
        )
        file.spec_id = table.spec().spec_id
        return file

    def _list_present(self, kind: Kind, table: Table) -> pa.ChunkedArray:
        """Return the paths of a table's files, those of the output without their folder."""
        from pyiceberg.manifest import ManifestContent

        prefix = self._prefix(kind)
        paths: list[str] = []
        with self._errors(kind):
            snapshot = table.current_snapshot()
            for manifest in snapshot.manifests(table.io) if snapshot else ():
                entries = manifest.fetch_manifest_entry(table.io, discard_deleted=True)
                if manifest.content == ManifestContent.DELETES and entries:
                    raise StoreError(
                        f"{self._identifiers[kind]} still names files of which another program deleted rows: drop the "
                        "table, without purging its files, and run `sightline publish`, which makes it anew"
                    )
                paths += [entry.data_file.file_path for entry in entries]
        return pa.chunked_array([pa.array([path.removeprefix(prefix) for path in paths], pa.string())])

    def _prefix(self, kind: Kind) -> str:
        uri = self._output.uri_of(kind)
        return f"{uri if is_remote(uri) else f'file://{uri}'}/"

    def _lacks_names(self, kind: Kind, table: Table) -> bool:
        """Tell whether the files have a column without a place in the table's name mapping: see `map_names`."""
        mapping = table.name_mapping()
        known = {name for field in mapping.root for name in field.names} if mapping else set()
        return not known.issuperset(self._files[kind].names)

    def _connect(self) -> Catalog:
        from pyiceberg.catalog import load_catalog

        found: dict[str, str] = {}
        if is_remote(self._output.uri):
            options = {"s3.endpoint": self._output.options.endpoint, "s3.region": self._output.options.region}
            found = {key: value for key, value in options.items() if value}
        with self._errors("data"):
            return load_catalog(self._catalog_name, **found)

    def _open(self, catalog: Catalog, kind: Kind) -> Table | None:
        """Return the table, or None if there is none. Raises `StoreError` for a table that is not this output's."""
        from pyiceberg.exceptions import NoSuchTableError

        with self._errors(kind):
            try:
                table = catalog.load_table(self._identifiers[kind])
            except NoSuchTableError:
                return None
        owner = table.properties.get(_OUTPUT)
        if owner != self._output.uri:
            raise StoreError(
                f"{self._identifiers[kind]} is a table of {owner or 'others'}: give another name. If this output was "
                f"moved or copied, its {TABLES} has the name too: remove it there, or drop the table, without purging "
                "its files, if nothing else is at its place"
            )
        if not table.spec().is_unpartitioned():
            raise StoreError(
                f"{self._identifiers[kind]} was partitioned by another program: drop the table, without purging its "
                "files, and run `sightline publish`, which makes it anew"
            )
        if table.properties.get(_RETRIES) != "0":
            raise StoreError(f"{self._identifiers[kind]} has another {_RETRIES} than 0: rows would be there twice")
        return table

    def _create(self, catalog: Catalog, kind: Kind) -> Table:
        """Make an empty table, or return the one that another process has made meanwhile."""
        from pyiceberg.exceptions import TableAlreadyExistsError

        properties = {
            _OUTPUT: self._output.uri,
            _RETRIES: "0",
            # Files of an expired snapshot are not deleted: they are the output's.
            "gc.enabled": "false",
        }
        with self._errors(kind):
            catalog.create_namespace_if_not_exists(self._namespace)
            try:
                return catalog.create_table(self._identifiers[kind], self._schemas[kind], properties=properties)
            except TableAlreadyExistsError:
                pass
        table = self._open(catalog, kind)
        if table is None:
            raise StoreError(f"{self._identifiers[kind]} was made, and is gone")
        return table

    @contextmanager
    def _errors(self, kind: Kind) -> Iterator[None]:
        """Raise what pyiceberg and its libraries raise, which have no common type, as `StoreError`."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise StoreError(
                f"the Iceberg table {self._identifiers[kind]} in the catalogue {self._catalog_name} cannot be used: "
                f"{line[:400]}"
            ) from error


def _read_state(table: Table) -> tuple[int, str]:
    """The number of ledgers that a table is at, and their digest, which is "" in a table of an earlier version."""
    return int(table.properties.get(_LEDGERS, "0")), table.properties.get(_STATE, "")


def _is_own(table: Table) -> bool:
    """Tell whether the current snapshot is the one that the table's state was noted with."""
    snapshot = table.current_snapshot()
    if snapshot is None or snapshot.summary is None:
        return False
    return snapshot.summary.get(_STATE) == table.properties.get(_STATE)
