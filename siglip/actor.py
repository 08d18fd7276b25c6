"""The actor: what Ray Data and Ray Serve both run on a GPU or on a CPU's cores."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip.checkpoint import PinnedModel
from siglip.scoring import Floats


class SiglipActor:
    """Embeds and tags batches of decoded images. A plain class that knows no Ray.

    A label set's embeddings are handed in as an array, computed once per run and not once per actor. Its arguments
    are small, because they travel to every actor.

    `threads` are the cores that it was given: Ray sets OMP_NUM_THREADS to an actor's num_cpus, which would leave
    torch on one thread for any actor that shares a machine's cores. `gpus` are those that it was given, and `sizes` the
    batches that come beside full ones: see `siglip.encoder.Encoder`.

    Raises `siglip.checkpoint.CheckpointError` when the checkpoint or the device cannot be used.
    """

    def __init__(
        self,
        pinned: PinnedModel,
        threads: int | None = None,
        *,
        texts: bool = False,
        gpus: float = 0,
        sizes: Sequence[int] = (),
    ) -> None:
        # Read when torch is loaded. Its threads spin while they wait for each other, and on a machine without a GPU
        # that takes the cores from the decoders: a tiny model's forward passes cost twice the CPU time.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        from siglip.encoder import Encoder

        if threads:
            torch.set_num_threads(threads)
        self.encoder = Encoder(pinned, texts=texts, gpus=gpus, sizes=sizes)
        self.model_seconds = 0.0
        # The first pass compiles or picks kernels: paid here, where nobody waits for an image.
        self.encoder.warm_up()

    def embed(self, pixels: NDArray[np.uint8]) -> Floats:
        """uint8 (N, S, S, 3) to float32 (N, D), unit norm. Adds to `model_seconds`."""
        start = time.perf_counter()
        embeddings = self.encoder.embed_images(pixels)
        self.model_seconds += time.perf_counter() - start
        return embeddings

    def describe(self) -> dict[str, Any]:
        """What this actor turned out to run on, for manifests and health pages."""
        encoder = self.encoder
        return {
            "device": encoder.device.type,
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "compiled": encoder.compiled,
            "batch_size": encoder.batch_size,
        }
