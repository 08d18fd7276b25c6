"""Exactly once on S3: SIGKILL of the driver, its workers or both at random moments. `test_property` kills on disks."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.output.output import Output
from pipelines.upkeep.verify import verify_output
from sightline.demo.dataset import encode_image
from sightline.demo.shapes import LABELS
from storage.schemes import open_store
from storage.store import StoreOptions, join
from tests.support.jobs import run_sightline
from tests.support.stores.radosgw import Radosgw
from tests.support.workers import choose_workers

TARS, PER_TAR, LOOSE = 9, 30, 30


def make_input(rng: random.Random) -> dict[str, bytes]:
    """Make tars and loose images, by name. The first image of each tar cannot be decoded."""
    files = {f"loose/{n}.jpg": encode_image(rng, LABELS[n]) for n in range(LOOSE)}
    for number in range(TARS):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for index in range(PER_TAR):
                data = encode_image(rng, rng.choice(LABELS)) if index else b"no image"
                member = tarfile.TarInfo(f"{number}-{index}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        files[f"{number}.tar"] = buffer.getvalue()
    return files


def digests(files: dict[str, bytes]) -> Counter[str]:
    """Count how often each image that can be decoded is in the input, by its digest."""
    found: Counter[str] = Counter()
    for name, data in files.items():
        if not name.endswith(".tar"):
            found[hashlib.sha256(data).hexdigest()] += 1
            continue
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            contents = [file.read() for member in tar if (file := tar.extractfile(member))]
        found.update(hashlib.sha256(content).hexdigest() for content in contents if content != b"no image")
    return found


def run(config: Path, kill: str, rng: random.Random, log: Path) -> int | None:
    """Run the job. After a random time kill the driver, half of its workers, or both. Returns the exit code."""
    with log.open("ab") as output:
        driver = subprocess.Popen(
            [sys.executable, "-m", "sightline", "tag", str(config)], stdout=output, stderr=output, env=os.environ
        )
    # On an idle machine Ray and the actors need about 6 s to start: one kill in four comes before that.
    time.sleep(rng.uniform(1, 6) if rng.random() < 0.25 else rng.uniform(6, 16))
    try:
        below = psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    workers = choose_workers(below)
    if kill in ("workers", "both"):
        for process in rng.sample(workers, (len(workers) + 1) // 2):
            process.kill()
    if kill in ("driver", "both"):
        driver.kill()
    code = driver.wait(timeout=300)
    if kill != "workers":
        # Workers must end with their driver, so that no process of a killed run works beside the next run.
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive
    return code


@pytest.mark.s3
@pytest.mark.usefixtures("local_ray")
def test_killed_at_any_moment_nothing_is_lost_or_doubled(s3_env: Radosgw, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    root = f"s3://{s3_env.new_bucket()}"
    store = open_store(root, StoreOptions.from_environment())
    files = make_input(rng)
    for name, data in files.items():
        store.put(join(root, "in", name), data)
    config = tmp_path / "job.yaml"
    keys = {"labels": list(LABELS), "rows_per_shard": PER_TAR, "max_reject_fraction": 0.1}
    config.write_text(yaml.safe_dump({"input": join(root, "in"), "output": join(root, "out"), **keys}))
    log = tmp_path / "log.txt"
    kinds = rng.sample(["driver", "workers", "both"], 3)
    codes = [run(config, kind, rng, log) for kind in kinds]
    story = f"{kinds} ended with {codes}\n"
    done = run_sightline("tag", str(config))
    assert done.returncode == 0, story + log.read_text() + done.stderr
    report = verify_output(Output(join(root, "out"), StoreOptions.from_environment()))
    assert report.ok, (story, report.problems)
    assert (report.rows_in, report.rows_rejected) == (TARS * PER_TAR + LOOSE, TARS)
    assert (report.orphans, report.duplicates, report.missing) == (0, 0, 0)
    tagged: Counter[str] = Counter()
    for entry in store.list(join(root, "out", "data")):
        table = pq.read_table(io.BytesIO(store.read(entry.uri)), columns=["sha256"])
        tagged.update(table["sha256"].to_pylist())
    assert tagged == digests(files), story
