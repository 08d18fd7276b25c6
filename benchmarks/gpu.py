"""Speed of the encoder, the job and the endpoint on this machine's GPU, each beside its limit, in under ten minutes.

    python -m benchmarks.gpu                       random weights of siglip-base-patch16-256's architecture
    python -m benchmarks.gpu --source DIR|ID       a checkpoint
    python -m benchmarks.gpu --device cpu --arch tiny --seconds 1 --images 200     without a GPU

Prints a table in Markdown for docs/performance.md. Each row has the rate in images/s, and its share of the limits: the
rate of the device's matrix products divided by the model's operations for an image, and of the rows about photos the
rate at which all cores of the machine decode them. The limits are measured in the same run. Nothing is compared with
another machine.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.batch import encoder_rate, run_job
from benchmarks.endpoint import endpoint, load, photo_body
from benchmarks.limits import decode_rate, matrix_rate
from benchmarks.photos import write_tars
from siglip.checkpoint import PinnedModel, pin_model
from siglip.checkpoints.architectures import ARCHITECTURES, init_checkpoint
from siglip.config import ModelConfig
from siglip.encoder import Encoder

BATCHES = {"cuda": (32, 64, 128, 256, 512), "cpu": (4, 8, 16)}
_CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Rate:
    """A row of the table: what was measured, in images/s, and whether photos had to be decoded for it."""

    what: str
    images_per_second: float
    decodes: bool = False


def load_encoder(pinned: PinnedModel, device: str, batch: int | str, *, compile: bool) -> Encoder:
    """Load a checkpoint's image tower on the device, for batches of `batch` images."""
    config = pinned.config.model_copy(update={"device": device, "batch_size": batch, "compile": compile})
    return Encoder(pin_model(config), texts=False, gpus=1 if device == "cuda" else 0)


def resident_rate(encoder: Encoder, seconds: float) -> float:
    """Measure forward passes alone, in images/s: one batch of pixels that is on the device already."""
    shape = encoder.batch_size, *encoder.spec.shape
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=encoder.device)
    wait: Callable[[], None] = torch.cuda.synchronize if encoder.device.type == "cuda" else lambda: None
    encoder.warm_up()
    with torch.inference_mode():
        encoder._forward(pixels)
        wait()
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            for _ in range(4):
                encoder._forward(pixels)
            wait()
            count += 4 * len(pixels)
    return count / elapsed


def measure(pinned: PinnedModel, arguments: argparse.Namespace, folder: Path) -> Iterator[Rate]:
    """Yield the rows of the table: the two limits first."""
    device, compile, seconds = arguments.device, not arguments.no_compile, arguments.seconds
    torch.set_num_threads(_CORES)
    chosen = load_encoder(pinned, device, "auto", compile=compile)
    dtype, batch = chosen.dtype, chosen.batch_size
    limit = matrix_rate(dtype, device, seconds=max(1.0, seconds / 2))
    yield Rate(f"limit: products of {str(dtype)[6:]}, {limit / 1e12:.2f} TFLOP/s", limit / pinned.vision_flops)
    photos = write_tars(folder / "input", 16, arguments.images // 16)
    size = chosen.spec.size or 256
    yield Rate(
        f"limit: decoding photos of 640 x 480 on {_CORES} cores", decode_rate(photos, size, _CORES, min(8.0, seconds))
    )
    yield Rate(f"the encoder, pixels in host memory, batches of {batch}", encoder_rate(chosen, seconds))
    del chosen
    for count in BATCHES[device]:
        gc.collect()
        encoder = load_encoder(pinned, device, count, compile=compile)
        yield Rate(f"the encoder alone, batches of {encoder.batch_size}", resident_rate(encoder, seconds))
        del encoder
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    gpus = 1 if device == "cuda" else 0
    extra: dict[str, Any] = {"actors": {"num_gpus": gpus}}
    for decode in ("exact", "fast"):
        run = run_job(
            folder, pinned.config.source, arguments.images // 16, compile, device=device, decode=decode, **extra
        )
        yield Rate(f"the job, from tars to Parquet, decode: {decode}", run["images_per_second"], decodes=True)
    model = {"source": pinned.config.source, "compile": compile, "device": device}
    clients = 256 if gpus else 16
    with endpoint(folder, model=model, replicas={"num_gpus": gpus}) as (port, _):
        found = load(port, photo_body(), folder, max(2.0, seconds), clients, warm=min(5.0, seconds))
    yield Rate(f"the endpoint, {clients} clients on the same machine", found["rate"], decodes=True)


def print_table(rates: Iterator[Rate]) -> None:
    """Print the rows as they are measured."""
    print("| what | images/s | of the products' limit | of the decoding limit |\n|---|---|---|---|", flush=True)
    limits: list[float] = []
    for rate in rates:
        cells = ["", ""]
        if len(limits) < 2:
            limits.append(rate.images_per_second)
        else:
            cells = [f"{rate.images_per_second / limits[0]:.0%}", ""]
            if rate.decodes:
                cells[1] = f"{rate.images_per_second / limits[1]:.0%}"
        print(f"| {rate.what} | {rate.images_per_second:,.1f} | {cells[0]} | {cells[1]} |", flush=True)


def main() -> None:
    """Measure, and print the table below a line about the machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="A checkpoint; without it, random weights.")
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="base")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--images", type=int, default=32_000, help="Photos that a job reads, a multiple of 16.")
    parser.add_argument("--seconds", type=float, default=8.0, help="Seconds of each measurement.")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("CUDA does not work here: run it on a machine with a GPU, or with --device cpu")
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "CPU"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.source is None:
            init_checkpoint(folder / "model", arguments.arch)
        pinned = pin_model(ModelConfig(source=arguments.source or str(folder / "model")))
        model = arguments.source or f"random weights of {arguments.arch}"
        print(
            f"{name}, {_CORES} cores, torch {torch.__version__}, {model}, {pinned.vision_flops / 1e9:.1f} GFLOP/image\n"
        )
        print_table(measure(pinned, arguments, folder))


if __name__ == "__main__":
    main()
