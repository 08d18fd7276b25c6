"""Kills two writers of an output with a Delta table at random moments, and counts the rows that its readers see.

    python -m benchmarks.killed_tables --kills 100
    python -m benchmarks.killed_tables --kills 100 --store s3                also azure, google
    python -m benchmarks.killed_tables --kills 100 --store s3 --iceberg

Two processes add shards, retry rejected rows and compact the same output, on a disk or on a server of the tests, and
bring its table up to it each time. One of them, or both, get SIGKILL. While both are gone, the table is read: no
row may be there twice, and every file that it names must be there. At the end one more run must complete the table. The
last line is the result. The exit code is 1 if anything was lost or doubled.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.support.stores.azurite import Azurite
from tests.support.stores.google_server import GoogleServer
from tests.support.stores.radosgw import Radosgw
from tests.support.table_writer import kill_writers, make_catalog

STORES: dict[str, tuple[str, Callable[[Path], Radosgw | GoogleServer | Azurite]]] = {
    "s3": ("s3", lambda folder: Radosgw(folder / "radosgw")),
    "google": ("gs", lambda folder: GoogleServer()),
    "azure": ("az", lambda folder: Azurite(folder / "azurite")),
}
"""By name, the scheme of a store, and the function that starts its server."""


def main() -> int:
    """Run the benchmark. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iceberg", action="store_true", help="an Iceberg table in an SQLite catalogue")
    parser.add_argument("--store", choices=["disk", *STORES], default="disk", help="where the output and its table lie")
    arguments = parser.parse_args()
    if arguments.iceberg and arguments.store in ("azure", "google"):
        parser.error("an Iceberg table is for an output on a disk or in S3")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sl-") as temporary, ExitStack() as stack:
        folder, root, environment = Path(temporary), temporary, {}
        if arguments.store != "disk":
            scheme, start = STORES[arguments.store]
            server = start(folder)
            stack.callback(server.stop)
            environment = dict(server.env)
            root = f"{scheme}://{server.new_bucket()}"
        uri, name = f"{root}/some folder/out", "delta"
        if arguments.iceberg:
            environment |= make_catalog(folder, root)
            name = "iceberg:tests/photos.images"
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
