"""Memory, time and requests of a listing and of a read of a dataset on the hub, on a stand-in for it on loopback.

    python -m benchmarks.hub [NAMES]

Each is measured in a process of its own: the peak of its memory before and after, its time, and the requests that the
server saw. The listing is compared with that of huggingface_hub's file system, which keeps all names.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from tests.support.stores.hub_server import HubServer

MIB = 2**20
LARGE = 400 * MIB
_BEGIN = """
import re, time
from pathlib import Path
from huggingface_hub import HfFileSystem
from storage.files import StoreFile
from storage.schemes import open_store

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def measure(what, run):
    run_one = iter(run())
    next(run_one)
    before, wall, cpu = peak(), time.monotonic(), time.process_time()
    count = sum(1 for _ in run_one) + 1
    print(f"{what}: {count:,} in {time.monotonic() - wall:.1f} s ({time.process_time() - cpu:.1f} s of CPU time), "
          f"peak memory {before:.0f} -> {peak():.0f} MiB")
"""
_LIST = """
measure("names listed", lambda: open_store("hf://").list("hf://datasets/owner/names"))
"""
_FIND = """
def find():
    yield
    yield from HfFileSystem().find("datasets/owner/names@main")
measure("names found by HfFileSystem", find)
"""
_READ = """
store = open_store("hf://")
(entry,) = store.list("hf://datasets/owner/large")
def read():
    with StoreFile(store, entry) as file:
        while file.read(2**20):
            yield
measure("MiB read", read)
"""


def main() -> None:
    """Run all measurements, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", type=int, nargs="?", default=200_000)
    names = parser.parse_args().names
    server = HubServer()
    server.commit("owner/names", {f"images/{n // 1000:04}/{n:07}.jpg": b"1" for n in range(names)})
    server.commit("owner/large", {"a.tar": os.urandom(LARGE)})
    env = {**os.environ, **server.env, "HF_TOKEN": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        for script in (_LIST, _FIND, _READ):
            server.clear()
            subprocess.run([sys.executable, "-c", _BEGIN + script], env=env, check=True)
            print(f"    {len(server.requests)} requests to the hub, {len(server.fetches)} to the host of large files")
    finally:
        server.stop()


if __name__ == "__main__":
    main()
