"""The model behind the endpoint: the batch job's actor, answering one request at a time out of full batches.

It knows no HTTP, no labels and no Ray: `serve.app` makes a Ray Serve deployment of it, tests use it as it is. torch is
imported by `ModelServer` and not by this module: its threads read OMP_WAIT_POLICY, set here, when they are loaded.
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
from siglip.scoring import Floats

PROBE_SECONDS = 20.0
"""A model that has answered nothing for this long, although asked, is ill."""


BATCH_SIZES = (1, 8, 64)
"""Batches that a compiled model has graphs for beside full ones: a lone image need not cost as much as those."""


class ModelServer:
    """`siglip.actor.SiglipActor` behind two queues, one for images and one for texts.

    The event loop stays free to take requests in: as many threads call the model as may, one or two. Batches of images
    and of texts take turns. A second batch of images waits in the model, so that no core waits for the last part of the
    first: 12.2 images/s of the base model on two cores, where they waited 11.5.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.metrics = ModelMetrics()
        # As the actor does, but before what is read of the configuration here loads torch.
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
            weights=pinned.identity,
            family=pinned.family,
            loaded=int(time.time()),
        )
        self._threads = ThreadPoolExecutor(encoder.concurrency, thread_name_prefix="model")
        drop = self.metrics.count_dropped
        self._images: Batcher[NDArray[np.uint8], Floats] = Batcher(
            self._run_images, encoder.batch_size, runners=encoder.concurrency, places=1, dropped=drop
        )
        self._texts: Batcher[str, Floats] = Batcher(self._run_texts, TEXT_BATCH, dropped=drop)
        self._answered = time.monotonic()
        self._busy = 0

    async def describe(self) -> ModelAbout:
        """What runs here."""
        return self.about

    async def embed_images(self, pixels: NDArray[np.uint8], seconds: float) -> Embedded:
        """uint8 (N, S, S, 3) to embeddings. `seconds` are left until nobody wants them: a clock of its own may differ.

        Pixels of another size, which an ingress of another model sent, give none: `weights` says why. Raises
        `serve.admission.batcher.Expired`.
        """
        if pixels.shape[1] != self.about.spec.size:
            return Embedded(np.zeros((0, self.about.width), np.float32), self.about.weights, 0.0, 0.0, 0)
        done = await self._images.submit(list(pixels), time.monotonic() + seconds)
        return self._embedded(done)

    async def embed_texts(self, texts: Sequence[str], seconds: float) -> Embedded:
        """Texts to embeddings, as `embed_images`. A label set's prompts come in pieces of whole batches."""
        done = await self._texts.submit(texts, time.monotonic() + seconds)
        return self._embedded(done)

    def _embedded(self, done: Done[Floats]) -> Embedded:
        return Embedded(np.asarray(done.results, np.float32), self.about.weights, done.waited, done.ran, done.batch)

    async def check_ready(self) -> None:
        """Raises `ModelStuck` when the model was given work and has answered nothing for `PROBE_SECONDS`."""
        if self._busy and time.monotonic() - self._answered > PROBE_SECONDS:
            raise ModelStuck(f"the model has not answered for {PROBE_SECONDS:g} s")

    async def check_health(self) -> None:
        """Ray Serve asks this of each replica. Raises when the model cannot answer, so that it is replaced.

        A model that has just answered is well. An idle one is made to embed an image, and a busy one is given
        `PROBE_SECONDS` to come to it.
        """
        if time.monotonic() - self._answered < PROBE_SECONDS / 2:
            return
        size = self.about.spec.size
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self._run_images([np.zeros((size, size, 3), np.uint8)], probe=True)
        except TimeoutError:
            raise ModelStuck(f"the model has not answered for {PROBE_SECONDS:g} s") from None

    async def _run_images(self, images: list[NDArray[np.uint8]], probe: bool = False) -> list[Floats]:
        vectors = await self._call(self._embed_images, images)
        if not probe:
            self.metrics.record_batch("image", len(images), self.about.batch_size)
        return list(vectors)

    async def _run_texts(self, texts: list[str]) -> list[Floats]:
        vectors = await self._call(self.actor.encoder.embed_texts, texts)
        self.metrics.record_batch("text", len(texts), self.about.text_batch)
        return list(vectors)

    def _embed_images(self, images: list[NDArray[np.uint8]]) -> Floats:
        return self.actor.embed(np.stack(images))

    async def _call(self, function: Any, items: list[Any]) -> Floats:
        if not self._busy:
            self._answered = time.monotonic()  # it was idle, not silent
        self._busy += 1
        try:
            vectors: Floats = await asyncio.get_running_loop().run_in_executor(self._threads, function, items)
        finally:
            self._busy -= 1
        if not np.isfinite(vectors).all():
            raise RuntimeError("the model gave numbers that are not finite")
        self._answered = time.monotonic()
        return vectors

    def close(self) -> None:
        """Stop taking batches up."""
        self._images.close()
        self._texts.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def choose_threads(config: EndpointConfig, pinned: PinnedModel) -> int | None:
    """Threads for torch: the cores that were asked for; without a GPU and a number, all of the machine.

    A small model runs on one: its layers are over before a second thread is awake, and the cores are the decoders'.
    """
    replicas = config.replicas
    if replicas.num_cpus is not None:
        return max(1, int(replicas.num_cpus))
    if replicas.num_gpus:
        return None
    return 1 if pinned.is_small else count_cores()


def resolve_compile(model: ModelConfig) -> ModelConfig:
    """`compile: auto` for an endpoint: on a GPU only.

    It takes minutes of a start on a CPU. Where throughput is all, say `compile: true`.
    """
    if model.compile != "auto":
        return model
    import torch

    if torch.cuda.is_available():
        return model
    return model.model_copy(update={"compile": False})
