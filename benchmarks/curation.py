"""What reads outputs, on a made-up one: seconds, rows a second and memory, beside what reading alone takes.

    python -m benchmarks.curation --rows 500000 5000000 --labels 100

Each step is a process of its own and reads the whole output, embeddings of 768 float32: `read` does nothing with them,
`matrix` scores them and keeps nothing, `sample` and `survey` (the report) are single passes, `retag` writes them anew.
The matrix rate is that of float32 products in blocks of one shape, which give an image the same bits in any batch.
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
from curation.sample import draw_sample
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from siglip.labels import LabelSet
from siglip.scoring import Floats

WIDTH, SHARD_ROWS = 768, 4096
STEPS = ("read", "matrix", "sample", "survey", "retag")


def make(root: str, rows: int, labels: int) -> None:
    """An output whose embeddings are a few thousand, turned about differently in each shard."""
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
    """One step, in this process."""
    if step == "retag":
        _retag(root)
        return
    output = open_output(root)
    steps = {"read": _read, "matrix": _score, "sample": lambda one: draw_sample(one, 100), "survey": compute_statistics}
    steps[step](output)


def _read(output: TaggedOutput) -> None:
    for batch in output.batches(["embedding"]):
        read_embeddings(batch)


def _score(output: TaggedOutput) -> None:
    for batch in output.batches(["embedding"]):
        output.head.logits(read_embeddings(batch))


def _retag(root: str) -> None:
    """By the command, with other thresholds: no model is asked."""
    labels = open_output(root).labels.model_copy(update={"threshold": 2e-5})
    with tempfile.TemporaryDirectory(dir=Path(root).parent) as folder:
        file = Path(folder) / "labels.yaml"
        file.write_text(yaml.safe_dump(labels.model_dump(mode="json", exclude_defaults=True)))
        target = Path(folder) / "target"
        command = [sys.executable, "-m", "sightline", "retag", root, "--labels", str(file), "--output", str(target)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shutil.rmtree(target)


def measure(step: str, root: str) -> tuple[float, float]:
    """Seconds and the peak memory in MiB of one step in a process of its own; of retag, of its largest process."""
    start = time.perf_counter()
    code = f"from benchmarks.curation import run_step; run_step({step!r}, {root!r}); from resource import *; "
    code += "print(max(getrusage(RUSAGE_SELF).ru_maxrss, getrusage(RUSAGE_CHILDREN).ru_maxrss))"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - start, int(done.stdout) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--folder", default=None, help="Where the outputs are made; 3 KB a row.")
    arguments = parser.parse_args()
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            made = f"{temporary}/made"
            make(made, rows, arguments.labels)
            print(f"{rows:,} rows, {arguments.labels} labels")
            reading = 0.0
            for step in STEPS:
                seconds, peak = measure(step, made)
                reading = reading or seconds
                print(
                    f"  {step:8s} {seconds:8.1f} s  {rows / seconds:10,.0f} rows/s  {seconds / reading:5.2f} x reading"
                    f"  {peak:7.0f} MiB",
                    flush=True,
                )
