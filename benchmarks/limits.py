"""The fastest that this machine can multiply matrices and decode JPEGs."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image

from siglip.images.decoder_server import KEEP_MEMORY
from siglip.torch_internals import multiply_int8, pack_int8

BICUBIC = Image.Resampling.BICUBIC


def matrix_rate(dtype: torch.dtype, device: str = "cpu", seconds: float = 4.0) -> float:
    """Measure large matrix products, in FLOP/s: shapes of the base model's batches, and square ones.

    Each shape is warmed up, and timed for at least a second. The fastest shape counts, because this is an upper limit.
    For int8, on CPUs with AVX-512 VNNI, products are of uint8 by packed int8: the fastest that torch has.
    """
    shapes = [(4096, 768, 3072), (4096, 3072, 768), (2048, 2048, 2048), (4096, 4096, 4096)]
    if device == "cuda":
        shapes = [(65536, 768, 3072), (8192, 8192, 8192), (16384, 16384, 16384)]
    best = 0.0
    for m, k, n in shapes:
        multiply = _make_product(m, k, n, dtype, device)
        for _ in range(3):
            multiply()
        _wait(device)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds / len(shapes):
            for _ in range(20 if device == "cuda" else 1):
                multiply()
                count += 1
            _wait(device)
        best = max(best, 2.0 * m * k * n * count / (time.perf_counter() - start))
    return best


def _make_product(m: int, k: int, n: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """Return a function that multiplies two matrices, (m, k) by (k, n)."""
    if dtype == torch.int8:
        rows = torch.randint(0, 256, (m, k), dtype=torch.uint8)
        packed = pack_int8(torch.randint(-127, 128, (n, k), dtype=torch.int8))
        return partial(multiply_int8, rows, packed, torch.ones(n), torch.zeros(n), torch.bfloat16)
    a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device)
    return partial(torch.mm, a, b, out=torch.empty(m, n, dtype=dtype, device=device))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def decode_rate(photos: list[bytes], size: int = 256, processes: int = 2, seconds: float = 8.0) -> float:
    """Measure processes that only decode JPEGs in memory and resize them to `size` x `size`, in images/s, all together.

    They decode with libjpeg-turbo and resize with torch's uint8 kernels: the fastest known combination that gives the
    same pixels as Pillow.
    """
    os.environ.update(KEEP_MEMORY)  # the processes inherit the environment that decoder processes have
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        pool.starmap(_decode_for, [(photos, size, 0.5)] * processes)  # warms up imports and caches
        counts = pool.starmap(_decode_for, [(photos, size, seconds)] * processes)
    return sum(counts)


def _decode_for(photos: list[bytes], size: int, seconds: float) -> float:
    import simplejpeg

    from siglip.images.resize import resize

    torch.set_num_threads(1)
    out = np.empty((size, size, 3), np.uint8)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        resize(simplejpeg.decode_jpeg(photos[count % len(photos)]), (size, size), BICUBIC, out=out)
        count += 1
    return count / elapsed
