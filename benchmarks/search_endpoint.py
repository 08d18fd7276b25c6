"""`POST /v1/search` over a large synthetic output: times, and the memory of the process that answers.

    python -m benchmarks.search_endpoint make FOLDER --rows 1000000
    python -m benchmarks.search_endpoint measure FOLDER

`make` writes an output with embeddings of 768 numbers, as `benchmarks.index` draws them, and thumbnails of 7 KB, and
makes its index. It needs about 14 GB for a million rows. The model is a checkpoint with random weights of the base
model's shape, so that texts cost what they cost there. `measure` runs the endpoint in this process, without Ray, and
prints the median and the 95th percentile of each sort of request.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.index import draw_images, draw_texts
from benchmarks.outputs import SyntheticOutput, write_output
from curation.index.build import build_index
from curation.tagged_output import open_output
from siglip.checkpoint import pin_model
from siglip.checkpoints.architectures import init_checkpoint
from siglip.config import ModelConfig
from siglip.labels import LabelSet
from siglip.scoring import Scale

WIDTH, ROWS_A_SHARD, LABELS, THUMBNAIL = 768, 4096, 50, 7000
ARCHITECTURE = "base"
SCALE = Scale(117.33, -29.0)
"""A bias with which few of the drawn images are relevant to a drawn text."""


def make(folder: Path, rows: int) -> None:
    """Write the checkpoint, the output and its index."""
    started = time.monotonic()
    checkpoint = folder / "model"
    if not checkpoint.exists():
        init_checkpoint(checkpoint, ARCHITECTURE)
    model = ModelConfig(source=str(checkpoint))
    random = np.random.default_rng(1)
    made = SyntheticOutput(
        LabelSet.model_validate({"names": [f"label {n}" for n in range(LABELS)], "threshold": 0.5, "top_k": 3}),
        draw_texts(LABELS, WIDTH, 5),
        -(-rows // ROWS_A_SHARD),
        lambda shard: draw_images(ROWS_A_SHARD, WIDTH, 100 + shard),
        dtype="float16",
        scale=SCALE,
        model=model,
        weights=pin_model(model).identity,
        thumbnail=lambda row: random.bytes(THUMBNAIL),
    )
    write_output(str(folder / "tags"), made)
    print(f"the output was written in {time.monotonic() - started:.0f} s", flush=True)
    started = time.monotonic()
    built = build_index(open_output(str(folder / "tags")), lambda line: print(line, flush=True))
    seconds, peak = time.monotonic() - started, psutil.Process().memory_info().rss / 2**30
    print(f"the index of {built.rows:,} rows took {seconds:.0f} s; {built}; {peak:.1f} GiB are resident", flush=True)


def measure(folder: Path, count: int) -> None:
    """Serve the output, and time requests."""
    from tests.support.endpoint import make_config, run_endpoint

    process = psutil.Process()
    config = make_config(
        model={"source": str(folder / "model"), "dtype": "float32"}, search={"output": str(folder / "tags")}
    )
    started = time.monotonic()
    with run_endpoint(config) as running:
        print(f"ready after {time.monotonic() - started:.0f} s, with the model in the same process", flush=True)
        first = process.memory_info().rss
        ids = [
            row["id"] for row in running.post("/v1/search", {"text": "a", "cutoff": "none", "top": 1000}).json()["data"]
        ]
        picked = np.random.default_rng(1).permutation(ids).tolist()
        sorts: dict[str, Any] = {
            "text": lambda n: {"text": f"label {n % LABELS}"},
            "text, no cut-off": lambda n: {"text": f"label {n % LABELS}", "cutoff": "none"},
            "a text that is new": lambda n: {"text": f"a new text {n}", "cutoff": "none"},
            "like an id": lambda n: {"like": picked[n]},
            "like a key": lambda n: {"like": f"image {n * 1009:08d}"},
            "text, label": lambda n: {"text": f"label {n % LABELS}", "labels": [f"label {(n + 7) % LABELS}"]},
            "text, not": lambda n: {"text": f"label {n % LABELS}", "not": [f"label {(n + 7) % LABELS}"]},
            "text, fold": lambda n: {"text": f"label {n % LABELS}", "cutoff": "none", "fold": True},
            "text, top 1000": lambda n: {"text": f"label {n % LABELS}", "cutoff": "none", "top": 1000},
            "text, 20 thumbnails": lambda n: {"text": f"label {n % LABELS}", "cutoff": "none", "thumbnails": True},
        }
        for name, body in sorts.items():
            seconds = []
            for number in range(count):
                begun = time.monotonic()
                response = running.post("/v1/search", body(number))
                assert response.status_code == 200, response.text
                seconds.append(time.monotonic() - begun)
            p50, p95 = np.percentile(seconds, [50, 95]) * 1000
            more = (process.memory_info().rss - first) / 2**20
            print(f"{name:22} p50 {p50:7.0f} ms  p95 {p95:7.0f} ms  memory {more:+,.0f} MiB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["make", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=50)
    given = parser.parse_args()
    if given.step == "make":
        make(given.folder, given.rows)
    else:
        measure(given.folder, given.requests)
