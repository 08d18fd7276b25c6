"""`Publication`: brings the tables of an output to the state of its ledgers, before files are deleted that they name.

`tables.json` in an output lists its tables. Every command that changes the output's files brings them up to it, whether
its configuration names a table or not: otherwise the tables would name files that are deleted.
"""

from __future__ import annotations

import json
from typing import Protocol

import pyarrow as pa

from pipelines.output.fingerprint import read_fingerprint
from pipelines.output.labels import make_format, read_label_table
from pipelines.output.ledger import Ledger
from pipelines.output.output import MANIFEST, TABLES, Output
from pipelines.output.schema import OutputFormat
from pipelines.output.state import OutputState, read_state
from pipelines.planning.plan import read_plan
from pipelines.tables.columns import choose_columns
from pipelines.tables.delta import DeltaTables, check_uri, import_deltalake
from pipelines.tables.iceberg import IcebergTables, check_place, import_pyiceberg
from pipelines.tables.names import DELTA, TABLE_NAMES, is_table
from pipelines.tables.rewriting import rewrite_partial
from pipelines.upkeep.merging import Kind
from storage.settings import ConfigError
from storage.store import NotFound, StoreError


class Tables(Protocol):
    """The tables of an output in one format: `DeltaTables` or `IcebergTables`."""

    name: str

    def prepare(self) -> None:
        """Make the tables that are not there yet, without files."""

    def is_current(self, ledger: Ledger) -> bool:
        """Tell whether the tables are at the state of the ledgers, as far as is known without their list of files."""

    def explain_unreadable(self) -> list[str]:
        """Return the columns of the files that keep a reader from the tables, though the tables are without them."""

    def publish(self, ledger: Ledger, *, compare: bool = False) -> tuple[int, int]:
        """Bring the tables to the state of the ledgers. Return how many files were added, and how many removed.

        With `compare`, all files are compared, also if the tables are at this state by their own notes.
        """


class Publication:
    """The tables of an output, and what has become of them. `wanted` is a table to make if it is not there yet.

    With `compare`, what other programs did to the tables is undone also if the output has not changed since. `lines`
    tell what was done, and `failure` what went wrong, empty if nothing did.
    """

    def __init__(self, wanted: str | None = None, *, compare: bool = False) -> None:
        self.wanted, self.compare = wanted, compare
        self.lines: list[str] = []
        self.failure = ""

    def __call__(self, state: OutputState) -> bool:
        """Publish all ledgers. Return whether the tables are at the state of the ledgers: if not, delete no file.

        True also if the output has no table. Raises nothing for trouble with a table or its store: see `failure`.
        """
        self.failure = ""
        faults: list[str] = []
        try:
            names = read_tables(state.output)
            if self.wanted is not None and self.wanted not in names:
                names.append(self.wanted)
            if names and state.ledger.count:
                format_ = read_format(state.output)
                rewrite_partial(state, format_)
                for name in names:  # one that is out of reach keeps no other one back
                    try:
                        self._publish(state, name, format_)
                    except (ConfigError, StoreError) as error:
                        faults.append(" ".join(str(error).split()))
        except (ConfigError, StoreError) as error:
            faults.append(" ".join(str(error).split()))
        if faults:
            self.failure = (
                f"the table was not brought up to the output: {'; '.join(faults)}; all that was committed stays: run "
                f"`sightline publish {state.output.uri}`, or the same command again"
            )
        return not faults

    def is_current(self, state: OutputState) -> bool:
        """Tell whether nothing is to be done. False also if that cannot be known."""
        try:
            found = compare_tables(state.output, state.ledger)
        except StoreError:
            return False
        made = self.wanted is None or self.wanted in found
        return not state.ledger.count or (made and not any(found.values()))

    def _publish(self, state: OutputState, name: str, format_: OutputFormat) -> None:
        output = state.output
        tables = _open(name, output, format_)
        if name == self.wanted and name not in (names := read_tables(output)):
            # First, so that a name that cannot be had is not one of the output's. Then, before a file is in the table.
            tables.prepare()
            output.store.put(output.uri_of(TABLES), json.dumps({"tables": [*names, name]}).encode())
        added, removed = tables.publish(state.ledger, compare=self.compare)
        if added or removed:
            rows = state.ledger.totals.rows_tagged
            self.lines.append(
                f"{tables.name} is up to date: {rows:,} images; files: {added:,} added, {removed:,} removed"
            )
            left_out = choose_columns(format_.data_schema())[1]
            self.lines += [f"{tables.name} is without the column {why}" for why in left_out]
            self.lines += [
                f"pyiceberg cannot read {tables.name}, because of the column {column!r} of the files; others may"
                for column in tables.explain_unreadable()
            ]


def check_table(name: str | None, uri: str) -> None:
    """Raise `ConfigError` before a run if the table of an output cannot be made, such as when a package is missing."""
    try:
        if name == DELTA:
            check_uri(uri)
            import_deltalake()
        elif name is not None:
            check_place(uri)
            import_pyiceberg()
    except ConfigError as error:
        raise ConfigError(f"table: {error}") from None


def publish_output(output: Output, wanted: str | None = None) -> Publication:
    """Bring the tables of an output up to it. Make `wanted` if it is not there, or a Delta table if there is no table.

    All files of the tables are compared. Raises `ConfigError` if there is no finished output, or if a package is not
    installed, and `StoreError` if the table could not be brought up to the output.
    """
    plan, fingerprint = read_plan(output, inputs=False), read_fingerprint(output)
    if not plan.segments or fingerprint is None:
        raise ConfigError(f"{output.uri}: there is no plan here, so this is no output of `sightline tag`")
    if not output.exists(MANIFEST):
        raise ConfigError(f"{output.uri} has no manifest.json: finish the output with `sightline tag` first")
    if wanted is not None and not is_table(wanted):
        raise ConfigError(f"{wanted} is no table: write {TABLE_NAMES}")
    names = read_tables(output)
    publication = Publication(wanted or (None if names else DELTA), compare=True)
    for name in {*names, publication.wanted}:
        check_table(name, output.uri)
    state = read_state(output, plan, publication)
    if not state.ledger.count:
        raise ConfigError(f"{output.uri}: nothing is committed here yet: run `sightline tag` first")
    if publication.is_current(state):
        publication(state)
    else:
        state.renew(fingerprint)
    if publication.failure:
        raise StoreError(publication.failure)
    return publication


def read_tables(output: Output) -> list[str]:
    """Return the tables of an output, as configurations name them. Raises `StoreError` if the list is damaged."""
    try:
        found = output.read_json(TABLES)
    except NotFound:
        return []
    names = found.get("tables")
    if not isinstance(names, list) or not all(isinstance(name, str) and is_table(name) for name in names):
        raise StoreError(f"{output.uri_of(TABLES)} is damaged, or of a later version of Sightline")
    return names


def compare_tables(output: Output, ledger: Ledger) -> dict[str, str]:
    """Return the tables of an output, each with why it is not at the state of the ledgers, or "" if it is.

    This goes by the tables' own notes of the ledgers that they are at, and does not read their list of files: only
    `publish_output` finds what another program added to a Delta table or took out of it. Raises `StoreError` if it
    cannot be known which tables there are.
    """
    found: dict[str, str] = {}
    for name in read_tables(output):
        try:
            current = not ledger.count or _open(name, output, read_format(output)).is_current(ledger)
            found[name] = "" if current else f"behind the output: run `sightline publish {output.uri}`"
        except (ConfigError, StoreError) as error:
            found[name] = " ".join(str(error).split())
    return found


def read_format(output: Output) -> OutputFormat:
    """Read the format of an output's files. Raises `StoreError`."""
    fingerprint = read_fingerprint(output)
    if fingerprint is None:
        raise StoreError(f"{output.uri} has no fingerprint.json")
    return make_format(fingerprint, read_label_table(output))


def _open(name: str, output: Output, format_: OutputFormat) -> Tables:
    files: dict[Kind, pa.Schema] = {"data": format_.data_schema(), "rejects": format_.rejects_schema()}
    schemas: dict[Kind, pa.Schema] = {kind: choose_columns(schema)[0] for kind, schema in files.items()}
    return DeltaTables(output, schemas) if name == DELTA else IcebergTables(output, schemas, name, files)
