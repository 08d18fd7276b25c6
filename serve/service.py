"""The endpoint's service behind the HTTP routes: its parts, start, stop and health."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from serve.admission.controller import AdmissionController
from serve.config import EndpointConfig
from serve.context import RequestContext
from serve.decoder_pool import DecoderPool
from serve.embedding.embedder import Embedder
from serve.embedding.inputs import ImageReader
from serve.embedding.model_client import ModelClient, wait_for_model
from serve.fetch.fetcher import Fetcher
from serve.http.errors import ApiError
from serve.http.quoting import quote
from serve.label_sets.cache import LabelCache
from serve.label_sets.registry import LabelSetRegistry
from serve.model import Model, ModelAbout, ModelStuck
from serve.rayserve.metrics import FLUSH_SECONDS, IngressMetrics
from serve.schemas import Fingerprint, Usage
from serve.supervision import Supervisor
from serve.tokens import TokenVocabulary
from serve.worker import WorkerThread

if TYPE_CHECKING:
    from serve.search.service import SearchService

READY_SECONDS = 5.0
"""Time limit for the model to respond to a health check."""
DEATH_SECONDS = 10.0
"""Seconds for which an ingress is not ready after a batch runner ended: others may end for the same reason."""
WARM_SECONDS = 60.0
"""Deadline of the image that starts a decoder process."""


class Service:
    """Owns the endpoint's parts and their lifetime; there is one for each ingress.

    `image_reader`, `embedder`, `label_sets` and `search` do a request's work; routes call them. `about`, `embedder` and
    `label_sets` exist once `start` has returned; `search` is None if it is not configured. `start` it in the event loop
    that serves.
    """

    about: ModelAbout
    embedder: Embedder
    label_sets: LabelSetRegistry
    decoders: DecoderPool

    def __init__(self, config: EndpointConfig, model: Model) -> None:
        self.config = config
        self.name = config.model_name()
        self.metrics = IngressMetrics()
        self.admission = AdmissionController(config.limits)
        self.vocabulary = TokenVocabulary(config.token_vocabulary) if config.token_vocabulary else None
        self.search: SearchService | None = None
        self._model = model
        self._fetcher = Fetcher(config.fetch)
        self.image_reader = ImageReader(config.limits, self._fetcher, self.admission)
        self._deaths = self._runner_deaths = 0
        self.worker = WorkerThread()
        self._last_death: float | None = None
        self._background = Supervisor()

    async def start(self) -> None:
        """Wait for the model, start the decoder processes and embed the registered label sets.

        The endpoint is ready for requests afterwards. Raises `TimeoutError` when the model does not start, and
        `storage.settings.ConfigError` when the configured output cannot be searched.
        """
        config = self.config
        self.about = await wait_for_model(self._model, config.model_digest())
        processes = config.ingress.decoder_processes()
        self.decoders = DecoderPool(
            self.about.spec, config.limits.image, config.decode, processes, self.admission.decoding
        )
        client = ModelClient(self._model, self.about)
        cache = LabelCache(config.limits.label_cache_bytes)
        self.embedder = Embedder(config, client, self.decoders, self.admission, self.metrics, cache.prompts)
        self._background.start("the task that passes metrics to Ray", self._flush_metrics)
        # A decoder process starts with its first image, and imports its libraries then: do that before requests come.
        warm = time.monotonic() + WARM_SECONDS
        await asyncio.gather(*(self.decoders.decode([b"?"], 1, warm) for _ in range(processes)))
        self.admission.decoding.forget()
        self.label_sets = LabelSetRegistry(config, client, self.embedder, cache, self.metrics)
        await self.label_sets.embed_registered()
        if config.label_sources:
            self._background.start("the task that reads changed label sets", self.label_sets.watch_files)
        if config.search is not None:
            # Imported here, because an endpoint without a search needs neither pyarrow's readers nor LanceDB.
            from serve.search.service import SearchService

            parts = (self.about, self.embedder, self.image_reader, cache, self.metrics)
            self.search = SearchService(config.search, *parts)
            await self.search.start()
            self._background.start("the task that looks for new commits", self.search.watch)

    async def close(self) -> None:
        """Stop background tasks and decoder processes, and close connections."""
        self._background.close()
        self.embedder.close()
        if self.search is not None:
            self.search.close()
        self.worker.close()
        self.decoders.close()
        await self._fetcher.aclose()

    async def check_ready(self) -> None:
        """Check that the model responds now and that no batch runner ended lately. Raises `ApiError` (unavailable)."""
        if self._ended_lately():
            raise ApiError("unavailable", "a batch runner ended", retry_after=DEATH_SECONDS)
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._model.check_ready()
        except (TimeoutError, ModelStuck):
            raise ApiError("unavailable", "the model does not respond", retry_after=READY_SECONDS) from None

    def fingerprint(self, labels_digest: str | None = None) -> Fingerprint:
        """The fingerprint of a response: identity of the model and digest of the label set."""
        return Fingerprint(model=self.about.weights, labels=labels_digest)

    def usage(self, context: RequestContext) -> Usage:
        """The images and text tokens that a request cost so far."""
        return Usage(
            prompt_tokens=context.tokens,
            total_tokens=context.tokens,
            images=context.images,
            truncated_texts=context.truncated,
        )

    def settle(self, context: RequestContext) -> None:
        """Charge a refused request for what was begun only: see `Embedder.settle`."""
        embedder = getattr(self, "embedder", None)  # not there before the service has started
        if embedder is not None:
            embedder.settle(context)

    def check_model(self, name: str | None) -> None:
        """Refuse a request that names another model. Raises `ApiError`."""
        if name is not None and name != self.name:
            raise ApiError("model_not_found", f"no model {quote(name)} here, only {self.name!r}", param="model")

    def check_dimensions(self, dimensions: int | None, param: str) -> None:
        """Refuse a request for embeddings of another width. Raises `ApiError`.

        0 is "not given": infinity's own client sends it by default.
        """
        if dimensions and dimensions != self.about.width:
            raise ApiError(
                "unsupported_dimensions",
                f"{param}: this model's embeddings have {self.about.width} dimensions and cannot be shortened: "
                f"leave {param} out",
                param=param,
            )

    async def _flush_metrics(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            self._ended_lately()
            self.metrics.flush(self.admission.in_flight.items)

    def _ended_lately(self) -> bool:
        """Count tasks that ended in the metrics; tell whether a batch runner ended within `DEATH_SECONDS`.

        Without the other tasks, an ingress still answers correctly, so it stays ready.
        """
        runners = self.embedder.died + self.decoders.died + self.worker.died
        runners += 0 if self.search is None else self.search.died
        if runners > self._runner_deaths:
            self._runner_deaths, self._last_death = runners, time.monotonic()
        deaths = runners + self._background.died
        self.metrics.count_deaths(deaths - self._deaths)
        self._deaths = deaths
        return self._last_death is not None and time.monotonic() - self._last_death < DEATH_SECONDS
