"""Speed of `model.dtype: int8` beside bfloat16, where the model is the limit: the base architecture, random weights.

    python -m benchmarks.int8 encoder      the encoder alone, beside the machine's matrix rates; start and memory
    python -m benchmarks.int8 job          the batch job
    python -m benchmarks.int8 endpoint     the endpoint

Both are compiled, and measured in turns, because a shared machine's speed varies. Medians count. Random weights show
the speed only: `sightline model compare` shows what int8 costs with your own checkpoint and images.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.batch import CORES, run_job
from benchmarks.endpoint import CLIENTS, batch_fill, endpoint, load, photo_body
from benchmarks.limits import matrix_rate
from benchmarks.photos import write_tars
from siglip.checkpoint import pin_model
from siglip.checkpoints.architectures import init_checkpoint
from siglip.config import ModelConfig
from siglip.encoder import Encoder

DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}


def report(what: str, rates: dict[str, list[float]]) -> dict[str, float]:
    """Print the medians of two dtypes, and their ratio. Return the medians."""
    middle = {dtype: statistics.median(found) for dtype, found in rates.items()}
    shown = ", ".join(f"{dtype} {rate:.2f}" for dtype, rate in middle.items())
    print(f"{what}: {shown}, ratio {middle['int8'] / middle['bfloat16']:.2f}", flush=True)
    return middle


def measure_encoder(directory: Path, turns: int) -> None:
    """Measure the encoder alone and products of matrices, in turns, in images/s; then start and memory."""
    torch.set_num_threads(CORES)
    flops = pin_model(ModelConfig(source=str(directory))).vision_flops
    encoders = {}
    for dtype in DTYPES:
        config = ModelConfig.model_validate({"source": str(directory), "dtype": dtype, "compile": True})
        encoders[dtype] = Encoder(pin_model(config), texts=False)
        encoders[dtype].warm_up()
    batch = encoders["int8"].batch_size
    # several batches in a call, as in a job
    pixels = np.random.default_rng(0).integers(0, 256, (8 * batch, *encoders["int8"].spec.shape), np.uint8)
    limits: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    rates: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    cpu: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for turn in range(turns):
        for dtype in sorted(DTYPES, reverse=turn % 2 == 1):
            limits[dtype].append(matrix_rate(DTYPES[dtype], seconds=2) / flops)
            start, used = time.perf_counter(), time.process_time()
            encoders[dtype].embed_images(pixels)
            rates[dtype].append(len(pixels) / (time.perf_counter() - start))
            cpu[dtype].append(1000 * (time.process_time() - used) / len(pixels))
    limit = report(f"limit, products of matrices, {flops / 1e9:.1f} GFLOP an image, images/s", limits)
    alone = report("the encoder alone, images/s", rates)
    report("the encoder alone, ms of CPU time an image", cpu)
    for dtype in DTYPES:
        print(f"{dtype}: {alone[dtype] / limit[dtype]:.0%} of the limit")
    for dtype in DTYPES:
        print(f"start of {dtype}, not compiled: {_start(directory, dtype, compile=False)}", flush=True)
        print(f"start of {dtype}, compiled for the first time: {_start(directory, dtype, fresh=True)}", flush=True)
        print(f"start of {dtype}, compiled before: {_start(directory, dtype)}", flush=True)


_START = """
import sys, time
start = time.perf_counter()
from siglip.actor import SiglipActor
from siglip.checkpoint import pin_model
from siglip.config import ModelConfig
config = ModelConfig(source=sys.argv[1], dtype=sys.argv[2], compile=sys.argv[4] == "True")
SiglipActor(pin_model(config), int(sys.argv[3]))
ready = time.perf_counter()
fields = dict(line.split(":", 1) for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
print(f"{ready - start:.1f} s, then {int(fields['Private_Dirty'].split()[0]) / 1024:.0f} MiB of private memory")
"""


def _start(directory: Path, dtype: str, compile: bool = True, fresh: bool = False) -> str:
    """Start an actor in its own process, without the graphs of earlier starts if `fresh`."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": empty} if fresh else dict(os.environ)
        command = [sys.executable, "-c", _START, str(directory), dtype, str(CORES), str(compile)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout.strip()


def measure_job(directory: Path, folder: Path, images: int, turns: int) -> None:
    """Measure the batch job, from JPEGs in tars to committed Parquet files."""
    write_tars(folder / "input", 4, images // 4)
    rates: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for turn in range(turns):
        for dtype in sorted(DTYPES, reverse=turn % 2 == 1):
            model = {"source": str(directory), "dtype": dtype, "compile": True}
            run = run_job(folder, str(directory), images // 4, True, model=model)
            rates[dtype].append(run["images_per_second"])
            print(f"{dtype}: {run['images_per_second']:.2f} images/s, busy {json.dumps(run['busy'])}", flush=True)
    report("the job, images/s", rates)


def measure_endpoint(directory: Path, folder: Path, seconds: float, turns: int) -> None:
    """Measure the endpoint with enough clients for full batches."""
    rates: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for turn in range(turns):
        for dtype in sorted(DTYPES, reverse=turn % 2 == 1):
            with endpoint(folder, model={"source": str(directory), "dtype": dtype, "compile": True}) as (port, metrics):
                result = load(port, photo_body(), folder, seconds, CLIENTS, warm=10)
                print(
                    f"{dtype}: {result['rate']:.2f} responses/s, {result['statuses']}, fill {batch_fill(metrics):.0%}"
                )
            rates[dtype].append(result["rate"])
    report(f"the endpoint, {CLIENTS} clients, responses/s", rates)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["encoder", "job", "endpoint"])
    parser.add_argument("--turns", type=int, help="How often each dtype is measured.")
    parser.add_argument("--images", type=int, default=480, help="Images of a job.")
    parser.add_argument("--seconds", type=float, default=30, help="Seconds of load on an endpoint.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        init_checkpoint(base, "base")
        if arguments.what == "encoder":
            measure_encoder(base, arguments.turns or 9)
        elif arguments.what == "job":
            measure_job(base, Path(temporary), arguments.images, arguments.turns or 2)
        else:
            measure_endpoint(base, Path(temporary), arguments.seconds, arguments.turns or 2)
