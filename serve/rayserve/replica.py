"""A model replica of the endpoint: runs the batch job's `SiglipActor` on batches that several requests share.

It knows no HTTP, no labels and no Ray: `serve.app` makes a Ray Serve deployment of it, and tests use it directly.
This module does not import torch, but `ModelServer` does: torch's threads read OMP_WAIT_POLICY once, when torch's
libraries are loaded, and `ModelServer` sets it first.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.admission.batcher import Batcher, Done
from serve.config import EndpointConfig, pin_endpoint_model
from serve.model import Embedded, ModelAbout, ModelStuck
from serve.rayserve.metrics import ModelMetrics
from siglip.actor import SiglipActor
from siglip.checkpoint import PinnedModel
from siglip.config import ModelConfig, count_cores
from siglip.label_text.tokens import Reading
from siglip.scoring import Floats

STUCK_SECONDS = 20.0
"""A model counts as stuck if it had work and has returned no result for this long."""

BATCH_SIZES = (1, 8, 64)
"""Batch sizes that a model is compiled for, in addition to full batches. A single image then does not cost as much as a
full batch."""


class ModelServer:
    """A `siglip.actor.SiglipActor` behind two queues, one for images and one for texts.

    The model is called in one or two threads (`Encoder.concurrency`), so the event loop can accept requests meanwhile.
    Batches of images and of texts take turns. With two threads a second batch of images waits inside the model, so that
    no core is idle during the last part of the first batch. On two cores the base model makes 12.2 images/s this
    way, and 11.5 images/s with one thread.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.metrics = ModelMetrics()
        # The actor sets it too, but reading the configuration here may import torch before the actor starts.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        pinned = pin_endpoint_model(config)
        pinned = replace(pinned, config=resolve_compile(pinned.config))
        gpus = config.replicas.num_gpus or 0
        self.actor = SiglipActor(pinned, choose_threads(config, pinned), texts=True, gpus=gpus, sizes=BATCH_SIZES)
        from siglip.encoder import TEXT_BATCH

        encoder = self.actor.encoder
        encoder.embed_texts(["warm"] * TEXT_BATCH)
        about = self.actor.describe()
        self.about = ModelAbout(
            config=config.model_digest(),
            spec=encoder.spec,
            width=encoder.width,
            scale=encoder.scale,
            text_length=encoder.text_length,
            batch_size=encoder.batch_size,
            text_batch=TEXT_BATCH,
            device=about["device"],
            dtype=about["dtype"],
            min_cosine=about["min_cosine"],
            weights=pinned.identity,
            family=pinned.family,
            loaded=int(time.time()),
        )
        self._threads = ThreadPoolExecutor(encoder.concurrency, thread_name_prefix="model")
        drop = self.metrics.count_dropped
        self._images: Batcher[NDArray[np.uint8], Floats] = Batcher(
            self._run_images, encoder.batch_size, runners=encoder.concurrency, places=1, dropped=drop
        )
        self._texts: Batcher[str, tuple[Floats, Reading]] = Batcher(self._run_texts, TEXT_BATCH, dropped=drop)
        self._answered = time.monotonic()
        self._busy = 0

    async def describe(self) -> ModelAbout:
        """Return the model's description."""
        return self.about

    async def embed_images(self, pixels: NDArray[np.uint8], seconds: float) -> Embedded:
        """Embed preprocessed images, uint8 (N, *spec.shape), within `seconds`.

        The deadline is passed as seconds from now, because the caller's clock may differ. Pixels of another shape,
        which an ingress of another model sends during an update, give no embeddings: `numbers` of the result tells the
        caller that this is another model. Raises `serve.admission.batcher.Expired`.
        """
        if pixels.shape[1:] != self.about.spec.shape:
            return Embedded(np.zeros((0, self.about.width), np.float32), self.about.numbers, 0.0, 0.0, 0)
        done = await self._images.submit(list(pixels), time.monotonic() + seconds)
        return self._embedded(done, done.results)

    async def embed_texts(self, texts: Sequence[str], seconds: float) -> Embedded:
        """Embed texts within `seconds`. A caller with many prompts sends them in several calls of full batches.

        Raises `serve.admission.batcher.Expired`.
        """
        done = await self._texts.submit(texts, time.monotonic() + seconds)
        return self._embedded(done, [vector for vector, _ in done.results], [reading for _, reading in done.results])

    def _embedded(self, done: Done[Any], vectors: Sequence[Floats], readings: list[Reading] | None = None) -> Embedded:
        rows = np.asarray(vectors, np.float32)
        return Embedded(rows, self.about.numbers, done.waited, done.ran, done.batch, readings)

    async def check_ready(self) -> None:
        """Raise `ModelStuck` if the model has work and has returned no result for `STUCK_SECONDS`."""
        if self._busy and time.monotonic() - self._answered > STUCK_SECONDS:
            raise ModelStuck(f"the model has not answered for {STUCK_SECONDS:g} s")

    async def check_health(self) -> None:
        """Health check that Ray Serve calls on each replica. If it raises, Ray Serve replaces the replica.

        A model that has just returned a result is healthy. Otherwise the model has to embed an image within
        `STUCK_SECONDS`; a busy model runs it after its current batches.
        """
        if time.monotonic() - self._answered < STUCK_SECONDS / 2:
            return
        black = np.zeros(self.about.spec.shape, np.uint8)
        try:
            async with asyncio.timeout(STUCK_SECONDS):
                await self._run_images([black], health_check=True)
        except TimeoutError:
            raise ModelStuck(f"the model has not answered for {STUCK_SECONDS:g} s") from None

    async def _run_images(self, images: list[NDArray[np.uint8]], health_check: bool = False) -> list[Floats]:
        vectors, _ = await self._call(self._embed_images, images)
        if not health_check:
            self.metrics.record_batch("image", len(images), self.about.batch_size)
        return list(vectors)

    async def _run_texts(self, texts: list[str]) -> list[tuple[Floats, Reading]]:
        vectors, readings = await self._call(self.actor.encoder.embed_and_read, texts)
        self.metrics.record_batch("text", len(texts), self.about.text_batch)
        return list(zip(vectors, readings, strict=True))

    def _embed_images(self, images: list[NDArray[np.uint8]]) -> tuple[Floats, None]:
        return self.actor.embed(np.stack(images)), None

    async def _call(self, function: Any, items: list[Any]) -> tuple[Floats, Any]:
        """Run the model in a thread: the embeddings, and what else `function` returns with them."""
        if not self._busy:
            self._answered = time.monotonic()  # the model was idle until now, so it was not stuck
        self._busy += 1
        try:
            vectors, more = await asyncio.get_running_loop().run_in_executor(self._threads, function, items)
        finally:
            self._busy -= 1
        if not np.isfinite(vectors).all():
            raise RuntimeError("the model gave numbers that are not finite")
        self._answered = time.monotonic()
        return vectors, more

    def close(self) -> None:
        """Start no more batches."""
        self._images.close()
        self._texts.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def choose_threads(config: EndpointConfig, pinned: PinnedModel) -> int | None:
    """Return the number of torch's threads: `replicas.num_cpus`, or without it all cores. None leaves it to torch.

    It is None for a GPU without `num_cpus`. A small model gets one thread: a layer ends before a second thread has
    woken up, and the decoders need the cores.
    """
    replicas = config.replicas
    if replicas.num_cpus is not None:
        return max(1, int(replicas.num_cpus))
    if replicas.num_gpus:
        return None
    return 1 if pinned.is_small else count_cores()


def resolve_compile(model: ModelConfig) -> ModelConfig:
    """Return the settings with `compile: auto` resolved: for an endpoint, compile on a GPU only.

    On a CPU, compiling makes the start minutes longer. Set `compile: true` if only throughput matters. With int8 it
    does: without compiling, int8 is slower than bfloat16.
    """
    if model.compile != "auto" or model.dtype == "int8":
        return model
    import torch

    if torch.cuda.is_available():
        return model
    return model.model_copy(update={"compile": False})
