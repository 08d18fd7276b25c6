"""What this machine can do at most: matrix products, and decoded JPEGs."""

from __future__ import annotations

import multiprocessing
import os
import time

import numpy as np
import torch
from PIL import Image

from siglip.images.decoder_server import KEEP_MEMORY

BICUBIC = Image.Resampling.BICUBIC


def matrix_rate(dtype: torch.dtype, device: str = "cpu", seconds: float = 4.0) -> float:
    """FLOP/s of the best of a few large matrix products: the shapes of a base encoder's batch and square ones.

    Each is warmed up and timed over at least a second. The best counts, because a limit is what can be reached.
    """
    shapes = [(4096, 768, 3072), (4096, 3072, 768), (2048, 2048, 2048), (4096, 4096, 4096)]
    if device == "cuda":
        shapes = [(65536, 768, 3072), (8192, 8192, 8192), (16384, 16384, 16384)]
    best = 0.0
    for m, k, n in shapes:
        a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device)
        out = torch.empty(m, n, dtype=dtype, device=device)
        for _ in range(3):
            torch.mm(a, b, out=out)
        _wait(device)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds / len(shapes):
            for _ in range(20 if device == "cuda" else 1):
                torch.mm(a, b, out=out)
                count += 1
            _wait(device)
        best = max(best, 2.0 * m * k * n * count / (time.perf_counter() - start))
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def decode_rate(photos: list[bytes], size: int = 256, processes: int = 2, seconds: float = 8.0) -> float:
    """Images/s of plain processes that do nothing but decode JPEGs in memory with libjpeg-turbo and resize them to
    `size` x `size` with torch's kernel for 8-bit samples: the fastest pair known here that keeps Pillow's pixels."""
    os.environ.update(KEEP_MEMORY)  # for the processes, as a decoder's has it
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        pool.starmap(_decode_for, [(photos, size, 0.5)] * processes)  # imports and caches
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
