"""A job over a list of 10,000 web URLs, of hosts that are fast, slow, dead, or do not keep to what they say.

    python -m benchmarks.web_list

The hosts are addresses of loopback, which a second process serves on the same cores. The command fetches the list
without a job, and then runs a job twice over it, with the tiny checkpoint and `fetch.runs: 2`. It checks that each URL
is in the output once, as it must be, and prints the images per second and the largest memory of a reader.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from ipaddress import ip_network
from pathlib import Path

import numpy as np
import psutil
import yaml

from benchmarks.photos import make_photo
from pipelines.config import ParquetConfig
from pipelines.inputs.rows import Input, Reading
from pipelines.inputs.web.config import FetchConfig
from pipelines.inputs.web.images import fetch_urls
from storage.store import StoreOptions

KINDS: dict[str, tuple[int, str]] = {
    "fast 1": (1600, "tagged"),
    "fast 2": (1600, "tagged"),
    "fast 3": (1600, "tagged"),
    "fast 4": (1600, "tagged"),
    "slow": (500, "tagged"),
    "says text/html": (500, "tagged"),
    "429, then 200": (500, "tagged"),
    "reset, then 200": (500, "tagged"),
    "too long a length": (300, "unreachable"),
    "too short a length": (300, "truncated"),
    "a page": (300, "not_an_image"),
    "404": (400, "missing"),
    "dead": (300, "unreachable"),
}
"""The hosts, each with its number of URLs and what becomes of them after two runs."""
SIDE = 512


class Hosts:
    """The servers, one for each kind. Each kind is an address of loopback, with the same port."""

    def __init__(self) -> None:
        self._photo = make_photo(np.random.default_rng(0), SIDE, SIDE)
        self._asked: set[str] = set()

    async def answer(self, kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request as the kind of host does, and close the connection."""
        try:
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
            again = kind + path in self._asked
            self._asked.add(kind + path)
            status, body, length, type_ = "200 OK", self._photo, len(self._photo), "image/jpeg"
            if kind == "dead":
                await asyncio.sleep(60)
            elif kind == "slow":
                await asyncio.sleep(random.uniform(0.1, 0.4))
            elif kind == "says text/html":
                type_ = "text/html"
            elif kind == "429, then 200" and not again:
                status, body, length = "429 Too Many Requests", b"", 0
            elif kind == "reset, then 200" and not again:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
                return
            elif kind == "too long a length":
                length += 1000
            elif kind == "too short a length":
                length //= 2
            elif kind == "a page":
                body, length, type_ = b"<html>Log in</html>", 19, "text/html"
            elif kind == "404":
                status, body, length = "404 Not Found", b"", 0
            head = (
                f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\nContent-Type: {type_}\r\nConnection: close\r\n\r\n"
            )
            writer.write(head.encode() + body)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def run(self, port: int) -> None:
        """Serve until the standard input ends, which it does when the benchmark ends in any way."""
        for number, kind in enumerate(KINDS, 1):

            async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: str = kind) -> None:
                await self.answer(kind, reader, writer)

            await asyncio.start_server(answer, f"127.0.0.{number}", port, backlog=1000)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


def list_urls(port: int) -> list[str]:
    """Return the URLs of all hosts, in a random order that is always the same."""
    urls = [
        f"http://127.0.0.{host}:{port}/{number}.jpg"
        for host, (count, _) in enumerate(KINDS.values(), 1)
        for number in range(count)
    ]
    random.Random(0).shuffle(urls)
    return urls


def watch_readers(job: subprocess.Popen[str]) -> int:
    """Wait for the end of a job, and return the largest memory of a process that reads shards, in bytes."""
    most = 0
    while job.poll() is None:
        for process in psutil.Process(job.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "read_shard" in " ".join(process.cmdline()):
                    most = max(most, process.memory_info().rss)
        time.sleep(0.5)
    return most


def measure_fetching(urls: list[str], fetch: FetchConfig) -> None:
    """Fetch all URLs in this process, and print the rate and the most bytes of images that were held."""
    reading = Reading(StoreOptions(), 2**26, ParquetConfig(), fetch=fetch)
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    found: Counter[str] = Counter()
    most = 0
    for number, (_, row) in enumerate(
        fetch_urls([(n, Input("uri", url, url, -1, "")) for n, url in enumerate(urls)], reading)
    ):
        found[row.rejected.reason if row.rejected else "fetched"] += 1
        if number % 100 == 0:
            most = max(most, psutil.Process().memory_info().rss)
    seconds = time.perf_counter() - start
    assert found.total() == len(urls)
    print(
        f"fetching alone: {len(urls) / seconds:,.0f} URLs/s in {seconds:.0f} s, memory grew by "
        f"{(most - before) / 2**20:,.0f} MiB; {dict(found.most_common())}"
    )


def run_job(config: Path) -> tuple[int, float, int]:
    """Run `sightline tag`. Return its exit code, the seconds, and the largest memory of a reader."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "sightline", "tag", str(config)]
    with tempfile.TemporaryFile("w+") as said:
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, text=True)
        most = watch_readers(job)
        said.seek(0)
        print(said.read()[-700:])
    return job.wait(), time.perf_counter() - start, most


def main() -> None:
    """Serve the hosts, or measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve the hosts, for the benchmark itself")
    port: int | None = parser.parse_args().serve
    if port is not None:
        asyncio.run(Hosts().run(port))
        return
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.web_list", "--serve", str(port)]
    with tempfile.TemporaryDirectory(prefix="sl-") as folder:
        for measure in (measure_alone, measure_job):
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hosts:
                assert hosts.stdout is not None
                hosts.stdout.readline()
                measure(port, Path(folder))
                hosts.communicate("")


def measure_alone(port: int, folder: Path) -> None:
    """Measure the fetching of all URLs in one process."""
    fetch = FetchConfig(enabled=True, max_seconds=3, ports=(port,), allowed_networks=(ip_network("127.0.0.0/8"),))
    measure_fetching(list_urls(port), fetch)


def measure_job(port: int, folder: Path) -> None:
    """Run the job twice, and check that each URL is in the output as it must be."""
    urls = list_urls(port)
    (folder / "list.csv").write_text("\n".join(["url", *urls, ""]))
    fetch = {"enabled": True, "runs": 2, "max_seconds": 3, "ports": [port], "allowed_networks": ["127.0.0.0/8"]}
    job = {"input": str(folder / "list.csv"), "output": str(folder / "out"), "labels": ["cat", "dog"], "fetch": fetch}
    (folder / "job.yaml").write_text(yaml.safe_dump({**job, "rows_per_shard": 2500, "max_reject_fraction": 1.0}))
    for expected in (1, 0):
        code, seconds, most = run_job(folder / "job.yaml")
        manifest = json.loads((folder / "out" / "manifest.json").read_text())
        run = manifest["run"]
        print(
            f"run with exit code {code} (expected {expected}): {run['rows']:,} images in {run['seconds']:.0f} s "
            f"({seconds:.0f} s with its start), {run['images_per_second']:,.0f} images/s, "
            f"largest reader {most / 2**20:,.0f} MiB"
        )
        assert manifest["rows_in"] == len(urls) == manifest["rows_tagged"] + manifest["rows_rejected"]
    wanted = Counter[str]()
    for count, outcome in KINDS.values():
        wanted[outcome] += count
    found = {"tagged": manifest["rows_tagged"], **manifest["reasons"]}
    print(f"after both: {found}, wanted {dict(wanted)}")
    assert {name: count for name, count in found.items() if count} == dict(wanted)


if __name__ == "__main__":
    main()
