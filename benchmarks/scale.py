"""What a night costs in an output with up to a million committed shards, and what very many inputs cost.

    python -m benchmarks.scale night --shards 1000 100000 1000000
    python -m benchmarks.scale known --inputs 10000000
    python -m benchmarks.scale pending --shards 20000

`night` makes inputs of one tar for each shard, and an output in which all of them are committed, by the project's own
writers of plans and ledgers; its data files are empty. It measures a run that finds nothing new, and one that finds a
tar of 100 images, and tells planning from the listing of the inputs, the start of Ray and the work on the tar. `known`
compares listed objects with as many planned ones. `pending` runs a job of shards with one image, and measures the CPU
time and the growth of the driver's memory for each shard.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import yaml
from PIL import Image

from pipelines.config import load_config
from pipelines.inputs.rows import Input
from pipelines.output.ledger import Ledger
from pipelines.output.output import Output, commit_path, shard_id
from pipelines.output.state import SEAL_SHARDS
from pipelines.planning.known import KnownInputs
from pipelines.planning.packing import SEGMENT_SHARDS, SegmentWriter
from storage.schemes import is_remote, open_store
from storage.store import Entry, StoreOptions, join
from tests.support.stores.radosgw import Radosgw

LABELS = ["red", "green"]
A_FOLDER = 1000
BATCH = 16_384
"""Objects that a run compares at once."""
THREADS = 16
LINKS = 30_000
"""Names of one file. ext4 allows 65,000."""


class Times:
    """A progress display that records when each step began, and the number of committed shards over time."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float]] = [("start", time.perf_counter())]
        self.shards = 0
        self.first: float | None = None

    def start(self, shards: int, rows: int) -> None:
        self.say("work")

    def say(self, message: str) -> None:
        self.steps.append((message, time.perf_counter()))

    def update(self, *, shards: int = 0, **_: Any) -> None:
        self.shards += shards
        if self.shards and self.first is None:
            self.first = time.perf_counter() - self.steps[-1][1]


def make_tar(images: int) -> bytes:
    """Return a tar of small images of one colour."""
    rng = random.Random(images)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number in range(images):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), tuple(rng.randrange(256) for _ in range(3))).save(buffer, "PNG")
            member = tarfile.TarInfo(f"{number:04}.png")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
    return content.getvalue()


def write_inputs(folder: str, count: int) -> list[Entry]:
    """Write `count` tars of one image, a thousand in each folder. On a disk they are names of a few files."""
    uris = [join(folder, f"{number // A_FOLDER:05}", f"{number % A_FOLDER:03}.tar") for number in range(count)]
    data = make_tar(1)
    store = open_store(folder, StoreOptions.from_environment())
    if is_remote(folder):
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(lambda uri: store.put(uri, data), uris))
    for number, uri in enumerate(uris):
        if number % A_FOLDER == 0:
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
        if number % LINKS == 0:
            store.put(uri, data)
            source = uri
        else:
            Path(uri).hardlink_to(source)
    return [Entry(uri, len(data), f"{len(data):x}-{os.stat(uri).st_mtime_ns:x}") for uri in uris]


def write_output(output: Output, inputs: list[Entry]) -> None:
    """Add one committed shard for each input to an output that a run has begun, whose first segment is its own."""
    first = len(output.segments())
    ledger = Ledger.read(output)
    for start in range(0, len(inputs), SEGMENT_SHARDS):
        number = first + start // SEGMENT_SHARDS
        segment = SegmentWriter(number)
        for entry in inputs[start : start + SEGMENT_SHARDS]:
            segment.add([Input("tar", entry.uri, entry.uri, entry.size, entry.etag, rows=1)])
        shards = [shard_id(number, index) for index in range(segment.shards)]
        with ThreadPoolExecutor(THREADS if is_remote(output.uri) else 1) as pool:
            for record in pool.map(partial(_write_commit, output), shards):
                ledger.add(record)
        assert output.put_if_absent(f"plan/{number:06d}.parquet", segment.close())
        if ledger.waiting >= SEAL_SHARDS:
            ledger.seal()
    ledger.seal()


def _write_commit(output: Output, shard: str) -> dict[str, Any]:
    """Write a shard's commit record and its data file, which is empty. Returns the record."""
    path = f"data/{shard}-{'0' * 12}.parquet"
    record = {
        "shard": shard,
        "generation": 0,
        "rows_in": 1,
        "rows_tagged": 1,
        "rows_rejected": 0,
        "reasons": {},
        "labels": {LABELS[0]: 1},
        "skipped": {},
        "files": [{"path": path, "rows": 1, "bytes": 9000, "sha256": shard.replace("-", "0") * 5}],
    }
    for name, text in ((commit_path(shard), json.dumps(record)), (path, "")):
        if is_remote(output.uri):
            output.store.put(output.uri_of(name), text.encode())
        else:  # without the fsync of a store
            Path(output.uri_of(name)).write_text(text)
    return record


def run_job(config: Path, sample: float | None = None, limit: int | None = None) -> dict[str, Any]:
    """Run a job in a process of its own, up to `limit` images. Returns what `_run` prints."""
    arguments = [sys.executable, "-m", "benchmarks.scale", "run", str(config), str(sample or 0), str(limit or 0)]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _run(config: Path, sample: float, limit: int) -> None:
    """Run a job in this process. Prints its steps in seconds, and the peak of its memory in MiB."""
    from pipelines.job import run_job
    from pipelines.limit import Limit

    times, process = Times(), psutil.Process()
    memory: list[tuple[int, int]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(sample or 0.02):
            memory.append((times.shards, process.memory_info().rss))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = time.process_time()
    outcome = run_job(load_config(config), times, None, Limit(images=limit or None))
    times.say("end")
    ended.set()
    watcher.join()
    steps = {name: round(after - at, 2) for (name, at), (_, after) in zip(times.steps, times.steps[1:], strict=False)}
    said = {
        "shards": outcome.new_shards,
        "steps": steps,
        "cpu": round(time.process_time() - before, 2),
        "mib": max(rss for _, rss in memory) >> 20,
        "slope": _fit_slope(memory) if sample else None,
        "first": times.first,
    }
    print(json.dumps(said))


def _fit_slope(memory: list[tuple[int, int]]) -> float | None:
    """Bytes of memory for each committed shard, by least squares over the second half of the shards."""
    points = np.array([point for point in memory if point[0] > memory[-1][0] / 2], float)
    return round(float(np.polyfit(points[:, 0], points[:, 1], 1)[0]), 1) if len(points) > 20 else None


def measure_night(shards: int, folder: Path, root: str) -> Iterator[str]:
    """Yield a line for each measurement of an output of this size, below the path or URI `root`."""
    inputs, output, seed = join(root, "input"), join(root, "output"), join(root, "seed")
    store = open_store(root, StoreOptions.from_environment())
    entries = write_inputs(inputs, shards)
    store.put(join(seed, "seed.tar"), make_tar(1))
    config = folder / "job.yaml"

    def configure(*where: str) -> None:
        job = {"input": [*where], "output": output, "labels": LABELS, "rows_per_shard": 100}
        config.write_text(yaml.safe_dump(job))

    configure(seed)
    run_job(config)
    write_output(Output(output, StoreOptions.from_environment()), entries)
    configure(seed, inputs)
    start = time.perf_counter()
    listed = sum(1 for _ in store.list(inputs))
    listing = time.perf_counter() - start
    yield f"  listing {listed:,} objects alone: {listing:.2f} s"
    run_job(config)  # writes the manifest of all shards, as the run would have that committed them
    for name in ("nothing new", "one new tar of 100 images"):
        if name != "nothing new":
            store.put(join(inputs, "new.tar"), make_tar(100))
        found = run_job(config)
        steps = found["steps"]
        ray = steps.get("starting Ray", 0) + steps.get("loading the model", 0)
        planning = steps["start"] + steps["listing the inputs"]
        work = steps.get("work", 0)
        yield (
            f"  {name}: planning {planning:.2f} s (with the listing), Ray and the model {ray:.2f} s, the tar and the "
            f"end {work:.2f} s; driver {found['cpu']:.1f} s of CPU, {found['mib']} MiB"
        )


def measure_known(count: int) -> Iterator[str]:
    """Yield lines about the comparison of listed objects with as many planned ones."""
    step = 500_000
    known, start = KnownInputs(), time.process_time()
    process = psutil.Process()
    base = process.memory_info().rss
    for first in range(0, count, step):
        rows = min(step, count - first)
        uris = [f"s3://bucket/images/{number // 1000:06}/{number:09}.jpg" for number in range(first, first + rows)]
        columns = {
            "kind": ["image"] * rows,
            "uri": uris,
            "size": pa.array([120_000] * rows, pa.int64()),
            "etag": [f"{number:032x}" for number in range(first, first + rows)],
            "metadata": pa.nulls(rows, pa.string()),
        }
        known.add(pa.table(columns))
    peak = process.memory_info().rss
    yield f"  {count:,} planned inputs: {time.process_time() - start:.1f} s of CPU to add"
    start, found = time.process_time(), 0
    for first in range(0, count, BATCH):
        numbers = range(first, min(first + BATCH, count))
        entries = [
            Entry(f"s3://bucket/images/{number // 1000:06}/{number:09}.jpg", 120_000, f"{number:032x}")
            for number in numbers
        ]
        found += int((known.find(entries) == 1).sum())
        peak = max(peak, process.memory_info().rss)
    assert found == count
    yield f"  {count:,} listed objects: {time.process_time() - start:.1f} s of CPU to compare, and to make them"
    yield f"  peak {peak >> 20} MiB, of which {base >> 20} MiB are the interpreter and its libraries"


def measure_pending(shards: int, root: Path, limit: int | None) -> Iterator[str]:
    """Yield lines about a job of many shards with one image each, of which it does `limit`."""
    write_inputs(str(root / "input"), shards)
    config = root / "job.yaml"
    job = {"input": str(root / "input"), "output": str(root / "output"), "labels": LABELS, "rows_per_shard": 1}
    config.write_text(yaml.safe_dump(job))
    start = time.perf_counter()
    before = psutil.cpu_times()
    found = run_job(config, 0.5, limit)
    done = found["shards"]
    after = psutil.cpu_times()
    busy = sum(getattr(after, name) - getattr(before, name) for name in ("user", "system", "nice"))
    yield f"  {done:,} shards in {time.perf_counter() - start:.0f} s; steps {found['steps']}"
    yield f"  the first is committed {found['first']:.1f} s after the first actor has started"
    machine, driver = 1000 * busy / done, 1000 * found["cpu"] / done
    yield f"  {machine:.1f} ms of CPU a shard on the whole machine, {driver:.1f} ms in the driver"
    yield f"  driver {found['mib']} MiB, {found['slope']} bytes a shard"


def main() -> None:
    """Run a benchmark, and print its lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, default in (("night", [1000, 100_000]), ("pending", [20_000])):
        command = commands.add_parser(name)
        command.add_argument("--shards", type=int, nargs="+", default=default)
        if name == "night":
            command.add_argument("--s3", action="store_true", help="on the S3 server of the tests; needs its packages")
        else:
            command.add_argument("--limit", type=int, help="Shards to do.")
        command.add_argument("--folder", default=None, help="Folder for the inputs and outputs.")
    commands.add_parser("known").add_argument("--inputs", type=int, default=10_000_000)
    run = commands.add_parser("run")
    run.add_argument("config", type=Path)
    run.add_argument("sample", type=float)
    run.add_argument("limit", type=int)
    arguments = parser.parse_args()
    if arguments.command == "run":
        _run(arguments.config, arguments.sample, arguments.limit)
    elif arguments.command == "known":
        for line in measure_known(arguments.inputs):
            print(line, flush=True)
    else:
        for shards in arguments.shards:
            print(f"{shards:,} shards", flush=True)
            with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary, ExitStack() as stack:
                folder = Path(temporary)
                if arguments.command == "pending":
                    lines = measure_pending(shards, folder, arguments.limit)
                elif arguments.s3:
                    server = Radosgw(folder / "radosgw")
                    stack.callback(server.stop)
                    os.environ.update(server.env)
                    lines = measure_night(shards, folder, f"s3://{server.new_bucket()}")
                else:
                    lines = measure_night(shards, folder, temporary)
                for line in lines:
                    print(line, flush=True)


if __name__ == "__main__":
    main()
