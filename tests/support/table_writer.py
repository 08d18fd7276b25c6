"""A process that grows, retries and compacts an output with a table again and again, until it is killed.

Each process is forked from one that has imported everything, so that it begins within milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from pipelines.output.output import Output
from pipelines.tables.delta import DeltaTables
from pipelines.tables.iceberg import IcebergTables
from pipelines.tables.publication import Publication, publish_output
from pipelines.upkeep import compaction
from pipelines.upkeep.compaction import compact_output
from pipelines.upkeep.verify import verify_output
from storage.settings import ConfigError
from storage.store import StoreError, StoreOptions
from tests.support.growing_output import GrowingOutput

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
SILENT: Any = SimpleNamespace(say=lambda line: None)


def work(uri: str, seed: int, errors: str, environment: dict[str, str], name: str) -> None:
    """Work on an output, which another process may do too, until a signal ends this one.

    What must not happen is written to the file `errors`. A `StoreError` may: another process was faster.
    """
    os.environ.update(environment)
    compaction.LEAST_FILES = 3
    rng = random.Random(seed)
    growing = GrowingOutput(uri)
    while True:
        publication = Publication(name)
        try:
            step = rng.choices(["grow", "retry", "compact"], [5, 3, 2])[0]
            if step == "grow":
                rejected = [row for row in range(4) if rng.random() < 0.3]
                growing.grow(rng.randint(1, 3), 4, rejected, publication)
            elif step == "retry":
                growing.retry(still=[row for row in range(4) if rng.random() < 0.5], publish=publication)
            else:
                compact_output(growing.output, SILENT)
            if publication.failure:
                raise RuntimeError(publication.failure)
        except (StoreError, ConfigError, AssertionError):  # the other has planned the same segment, or merged the files
            continue
        except Exception:
            Path(errors).write_text(traceback.format_exc())


@dataclass
class Table:
    """What a table names and what its files hold, compared with the output's ledgers."""

    uri: str
    name: str = "delta"
    kills: int = 0
    checks: int = 0
    missing: int = 0
    """Rows that the table did not have yet after a kill, in all checks."""
    problems: list[str] = field(default_factory=list)

    @property
    def output(self) -> Output:
        """The output."""
        return Output(self.uri, StoreOptions.from_environment())

    def read_keys(self, kind: Any) -> Counter[tuple[str, int]]:
        """Count each row of a table, by source and row number. Empty without a table."""
        if self.name != "delta":
            return self._read_iceberg(kind)
        table = DeltaTables(self.output, {"data": pa.schema([]), "rejects": pa.schema([])})._open(kind)
        if table is None:
            return Counter()
        files = {path.rpartition("/")[2] for path in self.output.files() if path.startswith(f"{kind}/")}
        if gone := {uri.rpartition("/")[2] for uri in table.file_uris()} - files:
            self.problems.append(f"check {self.checks}: the table of {kind} names {len(gone)} files that are gone")
            return Counter()
        rows = table.to_pyarrow_table(columns=["source", "row"])
        return Counter(zip(rows["source"].to_pylist(), rows["row"].to_pylist(), strict=True))

    def _read_iceberg(self, kind: Any) -> Counter[tuple[str, int]]:
        tables = IcebergTables(self.output, {}, self.name)
        table = tables._open(tables._connect(), kind)
        if table is None or table.current_snapshot() is None:
            return Counter()
        rows = table.scan(selected_fields=("source", "row")).to_arrow()
        return Counter(zip(rows["source"].to_pylist(), rows["row"].to_pylist(), strict=True))

    def check(self, *, complete: bool) -> None:
        """Check that no row is there twice, and that all are if the table is `complete`."""
        self.checks += 1
        tagged, rejected = self.read_keys("data"), self.read_keys("rejects")
        for name, counts in (("data", tagged), ("rejects", rejected)):
            if doubled := [key for key, count in counts.items() if count > 1]:
                self.problems.append(f"check {self.checks}: {len(doubled)} rows of {name} are there twice")
        report = verify_output(self.output)
        if complete:
            # A retry that was killed leaves files, until a later one of the same shard.
            if wrong := [problem for problem in report.problems if "belongs to no commit" not in problem]:
                self.problems.append(f"check {self.checks}: verify: {wrong}")
            if (len(tagged), len(rejected)) != (report.rows_tagged, report.rows_rejected):
                self.problems.append(
                    f"check {self.checks}: the table has {len(tagged)} and {len(rejected)} rows, and the output "
                    f"{report.rows_tagged} and {report.rows_rejected}"
                )
            if both := tagged.keys() & rejected.keys():
                self.problems.append(f"check {self.checks}: {len(both)} rows are tagged and rejected")
        else:
            self.missing += max(0, report.rows_tagged - len(tagged))


def kill_writers(
    uri: str,
    folder: Path,
    environment: dict[str, str],
    kills: int,
    seed: int,
    longest: float = 1.5,
    every: int = 1,
    name: str = "delta",
) -> Table:
    """Run two writers on an output, kill one of them at random moments, and check the table after each `every` kills.

    At the end the output is published once more, and then the table must be complete.
    """
    rng = random.Random(seed)
    errors = folder / "errors"
    table = Table(uri, name)
    started = 0

    def start() -> Any:
        nonlocal started
        started += 1
        process = CONTEXT.Process(target=work, args=(uri, 1000 * seed + started, str(errors), environment, name))
        process.start()
        return process

    GrowingOutput(uri)
    writers = [start(), start()]
    try:
        for kill in range(kills):
            time.sleep(rng.uniform(0.05, longest))
            number = rng.randrange(2)
            writers[number].kill()
            writers[number].join()
            if writers[number].exitcode == -signal.SIGKILL:
                table.kills += 1
            if kill % every == every - 1:  # both are gone, so that nothing changes while the table is read
                writers[1 - number].kill()
                writers[1 - number].join()
                table.kills += 1
                table.check(complete=False)
                writers[1 - number] = start()
            writers[number] = start()
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    if errors.exists():
        table.problems.append(errors.read_text())
    finish(table)
    return table


def finish(table: Table) -> None:
    """Do what the next run does, and check that the table is complete."""
    growing = GrowingOutput(table.uri)
    run = growing.run(Publication(table.name))
    for ref in list(run.state.list_pending()):
        run.commit(ref)
    run.finish()
    publish_output(growing.output)
    table.check(complete=True)


def make_catalog(folder: Path, root: str) -> dict[str, str]:
    """Return the environment in which pyiceberg has a catalogue `tests`, with its tables below `root`.

    The catalogue is a file of SQLite in a folder of this machine.
    """
    start = "PYICEBERG_CATALOG__TESTS__"
    catalog = {
        "TYPE": "sql",
        "URI": f"sqlite:///{folder}/catalog.db?timeout=60",
        "WAREHOUSE": f"{root if '://' in root else f'file://{root}'}/warehouse",
    }
    return {f"{start}{name}": value for name, value in catalog.items()}
