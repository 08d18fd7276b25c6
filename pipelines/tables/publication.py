"""`Publication`: brings the tables of an output to the state of its ledgers, before files are deleted that they name.

`tables.json` in an output lists its tables. Every command that changes the output's files brings them up to it, whether
its configuration names a table or not: otherwise the tables would name files that are deleted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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

    def count_ledgers(self) -> int:
        """Return the number of ledgers that all tables have."""

    def publish(self, ledger: Ledger) -> tuple[int, int]:
        """Bring the tables to the state of the ledgers. Return how many files were added, and how many removed."""


class Publication:
    """The tables of an output, and what has become of them. `wanted` is a table to make if it is not there yet.

    `lines` tell what was done, and `failure` what went wrong, empty if nothing did.
    """

    def __init__(self, wanted: str | None = None) -> None:
        self.wanted = wanted
        self.lines: list[str] = []
        self.failure = ""

    def __call__(self, state: OutputState) -> bool:
        """Publish all ledgers. Return whether the tables are at the state of the ledgers: if not, delete no file.

        True also if the output has no table. Raises nothing for trouble with a table or its store: see `failure`.
        """
        self.failure = ""
        try:
            names = self._claim(state.output)
            if names and state.ledger.count:
                self._publish(state, names)
        except (ConfigError, StoreError) as error:
            line = " ".join(str(error).split())
            self.failure = (
                f"the table was not brought up to the output: {line}; all that was committed stays: run `sightline "
                f"publish {state.output.uri}`, or the same command again"
            )
        return not self.failure

    def is_current(self, state: OutputState) -> bool:
        """Tell whether nothing is to be done. False also if that cannot be known."""
        try:
            names = read_tables(state.output)
            if self.wanted is not None and self.wanted not in names:
                return not state.ledger.count
            return all(
                _open(name, state.output, read_format(state.output)).count_ledgers() >= state.ledger.count
                for name in names
            )
        except (ConfigError, StoreError):
            return False

    def _claim(self, output: Output) -> list[str]:
        """Return the tables of the output, after the wanted one is written down too."""
        names = read_tables(output)
        if self.wanted is not None and self.wanted not in names:
            names.append(self.wanted)
            output.store.put(output.uri_of(TABLES), json.dumps({"tables": names}).encode())
        return names

    def _publish(self, state: OutputState, names: Sequence[str]) -> None:
        format_ = read_format(state.output)
        left_out = choose_columns(format_.data_schema())[1]
        rewrite_partial(state, format_)
        for name in names:
            tables = _open(name, state.output, format_)
            added, removed = tables.publish(state.ledger)
            if added or removed:
                rows = state.ledger.totals.rows_tagged
                self.lines.append(
                    f"{tables.name} is up to date: {rows:,} images; files: {added:,} added, {removed:,} removed"
                )
                self.lines += [f"{tables.name} is without the column {why}" for why in left_out]


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

    Raises `ConfigError` if there is no finished output, or if a package is not installed, and `StoreError` if the table
    could not be brought up to the output.
    """
    plan, fingerprint = read_plan(output, inputs=False), read_fingerprint(output)
    if not plan.segments or fingerprint is None:
        raise ConfigError(f"{output.uri}: there is no plan here, so this is no output of `sightline tag`")
    if not output.exists(MANIFEST):
        raise ConfigError(f"{output.uri} has no manifest.json: finish the output with `sightline tag` first")
    if wanted is not None and not is_table(wanted):
        raise ConfigError(f"{wanted} is no table: write {TABLE_NAMES}")
    names = read_tables(output)
    publication = Publication(wanted or (None if names else DELTA))
    for name in {*names, publication.wanted}:
        check_table(name, output.uri)
    state = read_state(output, plan, publication)
    if not publication.is_current(state):
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


def read_format(output: Output) -> OutputFormat:
    """Read the format of an output's files. Raises `StoreError`."""
    fingerprint = read_fingerprint(output)
    if fingerprint is None:
        raise StoreError(f"{output.uri} has no fingerprint.json")
    return make_format(fingerprint, read_label_table(output))


def _open(name: str, output: Output, format_: OutputFormat) -> Tables:
    data, rejects = (choose_columns(schema)[0] for schema in (format_.data_schema(), format_.rejects_schema()))
    schemas: dict[Kind, pa.Schema] = {"data": data, "rejects": rejects}
    return DeltaTables(output, schemas) if name == DELTA else IcebergTables(output, schemas, name)
