"""A job with millions of rows and thousands of shards: seconds and the driver's memory for two runs and `verify`.

    python -m benchmarks.rows --loose 500000 --listed 1500000 --rows-per-shard 200

The input is loose files, of which one in ten is a tiny image and the others are empty, and a list of names that do not
exist. Such rows take little time, but each is planned, read, rejected or tagged, written and committed like any other.
Runs `sightline tag` twice, where the second run must find nothing to do, and `sightline verify`. Does not measure
decoding.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from PIL import Image

DISTINCT = 100


def write_input(folder: Path, loose: int, listed: int) -> None:
    """Write the loose files, a thousand in each folder and all hard links to a few files, and the list."""
    rng = random.Random(0)
    sources = []
    (folder / "sources").mkdir(parents=True)
    for number in range(DISTINCT):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), tuple(rng.randrange(256) for _ in range(3))).save(buffer, "PNG")
        sources.append(folder / f"sources/{number}")
        sources[-1].write_bytes(buffer.getvalue() if number % 10 == 0 else b"")
    for number in range(loose):
        path = folder / f"loose/{number // 1000:04}/{number:07}.png"
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        path.hardlink_to(sources[number % DISTINCT])
    with open(folder / "list.txt", "w") as file:
        file.writelines(f"/nowhere/{number:07}.jpg\n" for number in range(listed))


def run(*arguments: str) -> dict[str, object]:
    """Run a command. Return its exit code, seconds, last lines, and the peak memory of its process in MiB."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "sightline", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    driver = psutil.Process(process.pid)
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.strip())
        try:
            peak = max(peak, driver.memory_info().rss)
        except psutil.Error:
            break
    code = process.wait()
    seconds = time.monotonic() - start
    return {"exit": code, "seconds": round(seconds, 1), "driver_mib": peak >> 20, "said": lines[-3:]}


def main() -> None:
    """Make the input, run the commands, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loose", type=int, default=50_000)
    parser.add_argument("--listed", type=int, default=150_000)
    parser.add_argument("--rows-per-shard", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_input(folder / "input", arguments.loose, arguments.listed)
        job = {
            "input": [str(folder / "input/loose"), str(folder / "input/list.txt")],
            "output": str(folder / "output"),
            "labels": ["red", "green"],
            "rows_per_shard": arguments.rows_per_shard,
            "max_reject_fraction": 1,
        }
        config = folder / "job.yaml"
        config.write_text(yaml.safe_dump(job))
        for step in (["tag", str(config)], ["tag", str(config)], ["verify", str(folder / "output")]):
            print(step[0], json.dumps(run(*step)), flush=True)
        manifest = json.loads((folder / "output/manifest.json").read_text())
        print({key: manifest[key] for key in ("planned_shards", "shards", "rows_in", "rows_tagged", "rows_rejected")})


if __name__ == "__main__":
    main()
