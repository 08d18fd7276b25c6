"""Speed of the batch job that reads from an S3 server on this machine: `python -m benchmarks.batch --s3`.

The images are like ImageNet's: JPEGs of 500 x 375 pixels and about 110 kB, resized to 256 x 256. The model is next to
nothing, so that reading and decoding are measured. Server and job share the cores. So the CPU time of each is measured
too, and the rate is also stated for each core that the server left to the job.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import yaml

from benchmarks.photos import write_tars
from siglip.checkpoints.architectures import init_checkpoint
from storage.schemes import open_store
from storage.store import StoreOptions
from tests.support.stores.radosgw import Radosgw

SIZE, QUALITY = (500, 375), 96
PER_TAR = 100
_CORES = len(os.sched_getaffinity(0))
_DAEMONS = ("radosgw", "ceph-osd", "ceph-mon")


@dataclass
class Spent:
    """CPU seconds of the store's processes and of the job's."""

    store: float = 0.0
    job: float = 0.0


def measure_s3(images: int) -> Iterator[str]:
    """Yield a line for the job from local tars, from tars on S3, and from single objects on S3.

    Each has `images` images, and a tar has 100.
    """
    with tempfile.TemporaryDirectory(prefix="sl-", dir="/tmp") as temporary:
        folder = Path(temporary)
        init_checkpoint(folder / "thin", "thin")
        photos = write_tars(folder / "input", images // PER_TAR, PER_TAR, size=SIZE, quality=QUALITY)
        yield f"{len(photos)} different photos, {np.mean([len(photo) for photo in photos]) / 1000:.0f} kB on average"
        server = Radosgw(folder / "s3")
        os.environ.update(server.env)
        try:
            bucket = f"s3://{server.new_bucket()}"
            store = open_store(bucket, StoreOptions(server.endpoint, "us-east-1"))
            for number in range(images):
                store.put(f"{bucket}/objects/{number:06d}.jpg", photos[number % len(photos)])
            tars = sorted((folder / "input").iterdir())
            for number in range(images // PER_TAR):
                store.put(f"{bucket}/tars/{number:06d}.tar", tars[number % len(tars)].read_bytes())
            for name, source in (
                ("tars on the disk", str(folder / "input")),
                ("tars on S3", f"{bucket}/tars"),
                ("objects on S3", f"{bucket}/objects"),
            ):
                yield _measure(name, folder, source, images, folder / "s3")
        finally:
            server.stop()


def _measure(name: str, folder: Path, source: str, images: int, server: Path) -> str:
    output = folder / f"output-{time.time_ns()}"
    config = {
        "input": source,
        "output": str(output),
        "labels": ["cat", "dog"],
        "model": {"source": str(folder / "thin"), "compile": False},
        "rows_per_shard": 500,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "sightline", "tag", str(folder / "job.yaml")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as job, _watch(job.pid, server) as spent:
        if job.wait():
            raise SystemExit(f"the job ended with {job.returncode}")
    manifest = json.loads((output / "manifest.json").read_text())
    if manifest["rows_tagged"] != images:
        raise SystemExit(f"{manifest['rows_tagged']} of {images} images were tagged")
    rate = manifest["run"]["images_per_second"]
    return (
        f"{name}: {rate:.0f} images/s, {rate / _CORES:.0f} for each core with the store on it; a core-second of the "
        f"job's processes, with their start: {images / spent.job:.0f} images; CPU time for an image: job "
        f"{1000 * spent.job / images:.1f} ms, store {1000 * spent.store / images:.1f} ms"
    )


@contextmanager
def _watch(job: int, server: Path) -> Iterator[Spent]:
    """Sum the CPU time of a job's processes, also of those that end, and of the server in a folder."""
    spent, ended = Spent(), threading.Event()
    times: dict[int, float] = {}

    def read(process: psutil.Process) -> float:
        with suppress(psutil.Error):
            used = process.cpu_times()
            return float(used.user + used.system)
        return 0.0

    daemons = [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] in _DAEMONS and any(str(server) in part for part in process.info["cmdline"] or ())
    ]

    def look() -> None:
        while not ended.wait(0.2):
            with suppress(psutil.Error):
                main = psutil.Process(job)
                for process in (main, *main.children(recursive=True)):
                    times[process.pid] = max(times.get(process.pid, 0.0), read(process))

    before = sum(map(read, daemons))
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield spent
    finally:
        ended.set()
        thread.join()
        spent.job = sum(times.values())
        spent.store = sum(map(read, daemons)) - before
