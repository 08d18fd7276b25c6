"""Kills two writers of an output with a Delta table at random moments, and counts the rows that its readers see.

    python -m benchmarks.killed_tables --kills 100
    python -m benchmarks.killed_tables --kills 100 --s3

Two processes add shards, retry rejected rows and compact the same output, on a disk or on the S3 server of the tests,
and bring its table up to it each time. One of them, or both, get SIGKILL. While both are gone, the table is read: no
row may be there twice, and every file that it names must be there. At the end one more run must complete the table. The
last line is the result. The exit code is 1 if anything was lost or doubled.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.support.stores.radosgw import Radosgw
from tests.support.table_writer import kill_writers, make_catalog


def main() -> int:
    """Run the benchmark. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iceberg", action="store_true", help="an Iceberg table in an SQLite catalogue, on a disk")
    parser.add_argument("--s3", action="store_true", help="on the S3 server of the tests; needs its packages")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sl-") as temporary, ExitStack() as stack:
        folder, uri, environment = Path(temporary), f"{temporary}/out", {}
        if arguments.s3:
            server = Radosgw(folder / "radosgw")
            stack.callback(server.stop)
            environment = server.env
            os.environ.update(environment)
            uri = f"s3://{server.new_bucket()}/some folder/out"
        name = "delta"
        if arguments.iceberg:
            environment, name = make_catalog(folder), "iceberg:tests/photos.images"
            os.environ.update(environment)
        table = kill_writers(uri, folder, environment, arguments.kills, arguments.seed, 2.0, 2, name)
    for problem in table.problems:
        print(problem)
    print(
        f"{table.kills} kills in {time.monotonic() - began:.0f} s, the table read {table.checks} times: "
        f"{len(table.problems)} problems; committed rows that it did not have yet: {table.missing}"
    )
    return int(bool(table.problems))


if __name__ == "__main__":
    sys.exit(main())
