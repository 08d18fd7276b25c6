"""Benchmark of the curation commands on a synthetic output: seconds, rows per second and memory of each step.

    python -m benchmarks.curation --rows 500000 5000000 --labels 100

Each step runs in its own process and reads the whole output; embeddings are 768 float32. `read` only reads the
embeddings, `matrix` also computes their logits, `sample` draws a sample, `statistics` computes those of the report, and
`retag` writes a new output. `matrix` multiplies float32 matrices in blocks of a fixed shape, so that an image gets the
same bits in any batch.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from benchmarks.outputs import SyntheticOutput, write_output
from curation.report.statistics import compute_statistics
from curation.sampling.sample import draw_sample
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from siglip.labels import LabelSet
from siglip.scoring import Floats

WIDTH, SHARD_ROWS = 768, 4096
STEPS = ("read", "matrix", "sample", "statistics", "retag")


def make(root: str, rows: int, labels: int) -> None:
    """Write an output of `rows` rows. All shards have the same 4,096 random vectors, rolled by the shard's number."""
    random = np.random.default_rng(0)
    base = random.standard_normal((SHARD_ROWS, WIDTH)).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)

    def embed(shard: int) -> Floats:
        count = min(SHARD_ROWS, rows - shard * SHARD_ROWS)
        return np.asarray(np.roll(base[:count], shard, axis=1))

    names = LabelSet.model_validate({"names": [f"label {row}" for row in range(labels)], "threshold": 1e-5, "top_k": 3})
    texts = np.roll(base[:labels], 7, axis=1)
    write_output(root, SyntheticOutput(names, texts, -(-rows // SHARD_ROWS), embed))


def run_step(step: str, root: str) -> None:
    """Run one step in this process."""
    if step == "retag":
        _retag(root)
        return
    output = open_output(root)
    steps = {
        "read": _read,
        "matrix": _score,
        "sample": lambda output: draw_sample(output, 100),
        "statistics": compute_statistics,
    }
    steps[step](output)


def _read(output: TaggedOutput) -> None:
    for batch in output.batches(["embedding"]):
        read_embeddings(batch)


def _score(output: TaggedOutput) -> None:
    for batch in output.batches(["embedding"]):
        output.head.logits(read_embeddings(batch))


def _retag(root: str) -> None:
    """Run `sightline retag` with other thresholds. The model is not loaded."""
    labels = open_output(root).labels.model_copy(update={"threshold": 2e-5})
    with tempfile.TemporaryDirectory(dir=Path(root).parent) as folder:
        file = Path(folder) / "labels.yaml"
        file.write_text(yaml.safe_dump(labels.model_dump(mode="json", exclude_defaults=True)))
        target = Path(folder) / "target"
        command = [sys.executable, "-m", "sightline", "retag", root, "--labels", str(file), "--output", str(target)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shutil.rmtree(target)


def measure(step: str, root: str) -> tuple[float, float]:
    """Seconds and peak memory in MiB of one step in its own process. For `retag`, the memory of its largest process."""
    start = time.perf_counter()
    code = f"from benchmarks.curation import run_step; run_step({step!r}, {root!r}); from resource import *; "
    code += "print(max(getrusage(RUSAGE_SELF).ru_maxrss, getrusage(RUSAGE_CHILDREN).ru_maxrss))"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - start, int(done.stdout) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--folder", default=None, help="Folder for the outputs; they take 3 KB per row.")
    arguments = parser.parse_args()
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            root = f"{temporary}/made"
            make(root, rows, arguments.labels)
            print(f"{rows:,} rows, {arguments.labels} labels")
            reading = 0.0
            for step in STEPS:
                seconds, peak = measure(step, root)
                reading = reading or seconds
                print(
                    f"  {step:10s} {seconds:8.1f} s  {rows / seconds:10,.0f} rows/s  {seconds / reading:5.2f} x read"
                    f"  {peak:7.0f} MiB",
                    flush=True,
                )
