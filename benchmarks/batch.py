"""Speed of the batch job, compared with the fastest that the machine allows.

    python -m benchmarks.batch tiny     decoding is the limit: compared with two processes that only decode
    python -m benchmarks.batch base     the model is the limit: compared with the encoder alone, and with transformers
    python -m benchmarks.batch --s3     reading from an S3 server and decoding are the limit, for each core

All figures of a run come from the same machine at about the same time. Compare ratios, not figures of different runs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks.limits import decode_rate, matrix_rate
from benchmarks.photos import write_tars
from benchmarks.s3_job import measure_s3
from sightline.demo.shapes import LABELS
from siglip.checkpoint import pin_model
from siglip.checkpoints.architectures import init_checkpoint
from siglip.checkpoints.self_test import draw_images
from siglip.config import ModelConfig
from siglip.encoder import Encoder

CORES = len(os.sched_getaffinity(0))
HERE = Path(__file__).resolve().parents[1]


def run_job(
    folder: Path,
    source: str,
    rows_per_shard: int,
    compile: bool | str,
    code: Path = HERE,
    device: str = "auto",
    **extra: Any,
) -> dict[str, Any]:
    """Tag the images in `folder`/input with the command line. Return the run's report from the manifest.

    `code` is the checkout of Sightline that runs. `extra` are further keys of the job.
    """
    config = {
        "input": str(folder / "input"),
        "output": str(folder / f"output-{time.time_ns()}"),
        "labels": list(LABELS),
        "model": {"source": source, "compile": compile, "device": device},
        "rows_per_shard": rows_per_shard,
        **extra,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "PYTHONPATH": str(code)}
    command = [sys.executable, "-m", "sightline", "tag", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=code, env=environment)
    manifest = json.loads((Path(str(config["output"])) / "manifest.json").read_text())
    return dict(manifest["run"])


def encoder_rate(encoder: Encoder, seconds: float) -> float:
    """Measure the encoder alone, in images/s: pixels in memory, several batches in a call as in a job."""
    pixels = np.tile(draw_images(encoder.spec)[:1], (8 * encoder.batch_size, *[1] * len(encoder.spec.shape)))
    encoder.warm_up()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        encoder.embed_images(pixels)
        count += len(pixels)
    return count / elapsed


def pipeline_rate(directory: Path, photos: list[bytes], labels: Sequence[str], count: int) -> float:
    """Measure transformers' zero-shot-image-classification pipeline, used as its documentation does, in images/s.

    It embeds the labels again for every image, so it is faster with fewer labels.
    """
    from transformers import pipeline

    classify = pipeline("zero-shot-image-classification", model=str(directory), device="cpu")
    images = [Image.open(io.BytesIO(data)) for data in photos[:count]]
    classify(images[0], candidate_labels=list(labels))
    start = time.perf_counter()
    for image in images:
        classify(image, candidate_labels=list(labels))
    return len(images) / (time.perf_counter() - start)


def measure_tiny(folder: Path, images: int, size: tuple[int, int], tars: int, old: Path | None) -> None:
    """Measure a job that is limited by decoding: the shipped tiny model. With `old`, alternate with another version."""
    photos = write_tars(folder / "input", tars, images // tars, distinct=64 if size[0] < 2000 else 8, size=size)
    limit = decode_rate(photos, 64, processes=2)
    turns = [("exact", old), ("exact", HERE), ("exact", old)] if old else []
    rates: dict[tuple[str, Path], list[float]] = {}
    for mode, code in [("exact", HERE), *turns, ("auto", HERE), ("fast", HERE)]:
        run = run_job(folder, "tiny", images // tars, False, code, decode=mode)
        rates.setdefault((mode, code), []).append(run["images_per_second"])
        print(f"decode: {mode:5}  {run['images_per_second']:8.1f} images/s  busy {run['busy']}", flush=True)
    limit = max(limit, decode_rate(photos, 64, processes=2))
    print(f"{size[0]} x {size[1]}: {tars} tars, two processes that only decode {limit:8.1f} images/s")
    for (mode, code), found in rates.items():
        rate = sum(found) / len(found)
        who = "the job" if code == HERE else "the other version's job"
        print(f"{who}, tiny model, decode: {mode:5} {rate:8.1f} images/s  {rate / limit:.0%}")


def measure_base(folder: Path, images: int, compile: bool) -> None:
    """Measure a job that is limited by the model: the architecture of siglip-base-patch16-256, random weights."""
    directory = folder / "base"
    init_checkpoint(directory, "base")
    photos = write_tars(folder / "input", 4, images // 4)
    torch.set_num_threads(CORES)
    encoder = Encoder(pin_model(ModelConfig(source=str(directory), compile=compile)), texts=False)
    limit = matrix_rate(encoder.dtype)
    before = encoder_rate(encoder, 30)
    run = run_job(folder, str(directory), images // 4, compile)
    after = encoder_rate(encoder, 30)
    limit = max(limit, matrix_rate(encoder.dtype))
    alone = (before + after) / 2
    del encoder
    theirs = pipeline_rate(directory, photos, LABELS, 8)
    with_two = pipeline_rate(directory, photos, LABELS[:2], 24)
    flops = pin_model(ModelConfig(source=str(directory))).vision_flops
    print(f"limit: {limit / 1e9:.0f} GFLOP/s                        {limit / flops:8.2f} images/s")
    print(f"encoder alone                      {alone:8.2f} images/s  {alone * flops / limit:.0%} of the limit")
    print(f"  before and after the job         {before:8.2f} {after:8.2f}")
    end_to_end = run["images_per_second"]
    print(
        f"the job, end to end                {end_to_end:8.2f} images/s  {end_to_end / alone:.0%} of the encoder alone"
    )
    for name, rate in (("64 labels", theirs), (" 2 labels", with_two)):
        print(f"transformers' pipeline, {name}  {rate:8.2f} images/s  the job is {end_to_end / rate:.1f} times that")
    print(f"actors {run['actors']}, busy {run['busy']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=["tiny", "base"], default="tiny")
    parser.add_argument("--s3", action="store_true", help="Read from an S3 server on loopback: see CONTRIBUTING.md.")
    parser.add_argument("--images", type=int)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--tars", type=int, default=16, help="Number of tars that the images are in, for tiny.")
    parser.add_argument("--size", default="640x480", help="Width and height of the photos, for tiny.")
    parser.add_argument("--old", type=Path, help="A checkout of another version to alternate with, for tiny.")
    arguments = parser.parse_args()
    if arguments.s3:
        for line in measure_s3(arguments.images or 6000):
            print(line, flush=True)
        raise SystemExit
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.model == "tiny":
            width, height = arguments.size.split("x")
            size = int(width), int(height)
            measure_tiny(Path(temporary), arguments.images or 9600, size, arguments.tars, arguments.old)
        else:
            measure_base(Path(temporary), arguments.images or 256, not arguments.no_compile)
