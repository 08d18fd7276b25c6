"""Peak memory of the driver, with a number of shards and with ten times as many.

    python -m benchmarks.memory

The shards and images are small, because only the driver's data about each shard could grow, not the images. The peak is
VmHWM of the driver's process, without Ray's daemons and workers, which are other processes.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from sightline.demo.dataset import encode_image
from sightline.demo.shapes import LABELS


def peak_mib(folder: Path, images: int, per_shard: int) -> float:
    """Tag `images` loose images, and return the driver's peak resident memory in MiB."""
    rng = random.Random(0)
    source = folder / f"input-{images}"
    source.mkdir()
    few = [encode_image(rng, label) for label in LABELS]
    for number in range(images):
        (source / f"{number:06d}.jpg").write_bytes(few[number % len(few)])
    config = folder / f"job-{images}.yaml"
    keys = {"input": str(source), "output": str(folder / f"output-{images}"), "rows_per_shard": per_shard}
    config.write_text(yaml.safe_dump({**keys, "labels": list(LABELS)}))
    driver = subprocess.Popen([sys.executable, "-m", "sightline", "tag", str(config)], stderr=subprocess.DEVNULL)
    peak = 0
    while driver.poll() is None:
        try:
            status = Path(f"/proc/{driver.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
            driver.wait(timeout=0.2)
        except (subprocess.TimeoutExpired, OSError):
            continue
    if driver.returncode:
        raise SystemExit(f"the job ended with {driver.returncode}")
    return peak / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=60)
    parser.add_argument("--per-shard", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        peaks = [
            peak_mib(Path(temporary), shards * arguments.per_shard, arguments.per_shard)
            for shards in (arguments.shards, 10 * arguments.shards)
        ]
    for shards, peak in zip((arguments.shards, 10 * arguments.shards), peaks, strict=True):
        print(f"{shards:6d} shards  {peak:8.1f} MiB")
    print(f"ten times the shards: {peaks[1] / peaks[0] - 1:+.0%}")
