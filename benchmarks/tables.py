"""How long a table of many files takes, and how much memory: to publish an output, a night, a compaction.

    python -m benchmarks.tables --files 1000000
    python -m benchmarks.tables --files 100000 --iceberg

The ledgers are made up: the files that they name are not there, because nothing of this reads them. Each step is a
process of its own, and its peak of resident memory is that of everything that is loaded, 0.2 GB without any table.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipelines.output.ledger import Ledger, ledger_path
from pipelines.output.output import Output
from pipelines.output.state import OutputState
from pipelines.output.totals import Totals, encode_ledger
from pipelines.planning.plan import read_plan
from pipelines.tables.publication import Publication
from tests.support.growing_output import GrowingOutput
from tests.support.table_writer import make_catalog

LEDGER_FILES = 10_000
"""Files that a ledger names, as those of large runs do."""
NIGHT_FILES = 1000
MERGED = 100
"""Files that become one in the compaction."""


def make_row(number: int, **replaced: Any) -> dict[str, Any]:
    """A row of a ledger about a made-up shard with 4096 images in one file of 13 MB."""
    segment, shard = divmod(number, 100_000)
    row = {
        "segment": segment,
        "number": shard,
        "generation": 0,
        "kind": "data",
        "path": f"data/{segment:06d}-{shard:06d}-{number:012x}.parquet",
        "first": 0,
        "rows": 4096,
        "bytes": 13_000_000,
        "sha256": f"{number:064x}",
        "reasons": None,
    }
    return {**row, **replaced}


def write_ledger(output: Output, rows: list[dict[str, Any]], *, moved: bool = False) -> None:
    """Write the next ledger."""
    count = sum(1 for _ in output.store.names(output.uri_of("ledger")))
    totals = Totals() if moved else Totals(shards=len(rows), rows_in=4096 * len(rows), rows_tagged=4096 * len(rows))
    assert output.put_if_absent(ledger_path(count), encode_ledger(rows, totals))


def publish(root: str, name: str, compare: bool) -> None:
    """Publish an output, and print what that took. `compare` is what `sightline publish` does, and a run does not."""
    output = Output(root)
    publication = Publication(name, compare=compare)
    began = time.monotonic()
    ledger = Ledger.read(output)
    read = time.monotonic()
    assert publication(OutputState(output, read_plan(output), ledger)), publication.failure
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    line = publication.lines[0] if publication.lines else "nothing to do"
    print(
        f"  {line}: {read - began:.1f} s for the ledgers, {time.monotonic() - read:.1f} s for the table, "
        f"{peak:.2f} GiB at most",
        flush=True,
    )


def main() -> None:
    """Run the benchmark, and print its lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--iceberg", action="store_true", help="an Iceberg table in an SQLite catalogue")
    parser.add_argument("--publish", metavar="OUTPUT", help=argparse.SUPPRESS)
    parser.add_argument("--compare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.publish:
        publish(arguments.publish, "iceberg:tests/photos.images" if arguments.iceberg else "delta", arguments.compare)
        return
    with tempfile.TemporaryDirectory(prefix="sl-") as temporary:
        root = f"{temporary}/tags"
        output = GrowingOutput(Path(root)).output
        environment = {**os.environ, **make_catalog(Path(temporary), temporary)}
        kind = ["--iceberg"] if arguments.iceberg else []

        def step(name: str, *how: str) -> None:
            print(name, flush=True)
            command = [sys.executable, "-m", "benchmarks.tables", "--publish", root, *kind, *how]
            subprocess.run(command, check=True, env=environment)

        for first in range(0, arguments.files, LEDGER_FILES):
            stop = min(first + LEDGER_FILES, arguments.files)
            write_ledger(output, [make_row(number) for number in range(first, stop)])
        step(f"an output with {arguments.files:,} files")
        step("a run that finds nothing to do")
        step("`sightline publish`, which compares all files", "--compare")
        for night in range(3):
            first = arguments.files + night * NIGHT_FILES
            write_ledger(output, [make_row(number) for number in range(first, first + NIGHT_FILES)])
            step(f"a night with {NIGHT_FILES:,} files")
        merged = [
            make_row(
                number,
                path=f"data/merged-20260101T000000-{number // MERGED:012x}.parquet",
                first=4096 * (number % MERGED),
                bytes=13_000_000 * MERGED,
            )
            for number in range(arguments.files // 10 // MERGED * MERGED)
        ]
        write_ledger(output, merged, moved=True)
        step(f"a compaction of {len(merged):,} files")


if __name__ == "__main__":
    main()
