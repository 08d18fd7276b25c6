"""The actor class: holds a model on a GPU or on CPU cores. Ray Data and Ray Serve both run it."""

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
    """Embeds batches of decoded images with one model. A plain class that does not use Ray.

    Its arguments are small, because they are sent to every actor.

    `threads` is the number of CPU cores of the actor. It is needed because Ray sets OMP_NUM_THREADS to an actor's
    num_cpus, which would give torch one thread in every actor that shares the cores of a machine. `gpus` is the number
    of GPUs of the actor. `texts` also loads the text tower. `sizes` are the batch sizes that occur besides full
    batches: see `siglip.encoder.Encoder`.

    Raises `siglip.checkpoints.files.CheckpointError` when the checkpoint or the device cannot be used.
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
        # torch reads it when it is loaded. By default its threads spin while they wait for each other. On a machine
        # without a GPU that takes CPU time from the decoders: a tiny model's forward passes needed twice the CPU time.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        from siglip.cpu import release_memory
        from siglip.encoder import Encoder

        if threads:
            torch.set_num_threads(threads)
        self.encoder = Encoder(pinned, texts=texts, gpus=gpus, sizes=sizes)
        self.model_seconds = 0.0
        # The first forward pass compiles or chooses kernels. Done here, before any image waits for it.
        self.encoder.warm_up()
        release_memory()

    def embed(self, pixels: NDArray[np.uint8]) -> Floats:
        """Embed images: uint8 (N, *spec.shape) to float32 (N, D) of unit norm. Adds the time to `model_seconds`."""
        start = time.perf_counter()
        embeddings = self.encoder.embed_images(pixels)
        self.model_seconds += time.perf_counter() - start
        return embeddings

    def describe(self) -> dict[str, Any]:
        """The device, dtype, batch size and compilation that this actor uses, for manifests and health pages.

        `min_cosine` is the lowest cosine of the self-test's images with float32, None in float32.
        """
        encoder = self.encoder
        return {
            "device": encoder.device.type,
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "compiled": encoder.compiled,
            "batch_size": encoder.batch_size,
            "min_cosine": encoder.min_cosine,
        }
