"""What the endpoint does, whatever shape it was asked in: images and texts to embeddings, and to labels."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serve.batcher import Batcher, Expired
from serve.config import EndpointConfig
from serve.decoding import DecoderPool
from serve.errors import ApiError, image_error
from serve.fetch import Fetcher
from serve.gate import Gate, Pass
from serve.inputs import read_images
from serve.labels import LabelCache, Question, embed_question
from serve.metrics import FLUSH_SECONDS, IngressMetrics
from serve.model import Embedded, ModelAbout, ModelStuck
from serve.schemas import Fingerprint, LabelQuestion, Usage
from siglip.families import FAMILIES, Family
from siglip.images import ImageRejected
from siglip.labels import DEFAULT_TEMPLATE, LabelSet
from siglip.scoring import Floats, score_pairs, select, sigmoid, softmax

log = logging.getLogger("ray.serve.sightline")

START_SECONDS = 3600.0
"""How long to wait for the model when starting: a node may have to come up, and weights to be fetched."""
READY_SECONDS = 5.0
RETRY_AFTER = 2.0
"""Seconds after which a request that the model failed on may come again."""
CALLS_PER_REPLICA = 2
"""Calls that an ingress has under way for each replica: one that is computed, and one that is ready to be. The queue
is therefore here, where it is known whose client has gone and whose deadline has passed."""


class Model(Protocol):
    """`serve.model.ModelServer`, here or behind a handle."""

    async def describe(self) -> ModelAbout: ...

    async def check_ready(self) -> None: ...

    async def embed_images(self, pixels: np.ndarray, seconds: float) -> Embedded: ...

    async def embed_texts(self, texts: Sequence[str], seconds: float) -> Embedded: ...


@dataclass(frozen=True)
class _Vector:
    """An image's embedding (D,), and the seconds of its batch in the replica."""

    vector: Floats
    waited: float
    ran: float


@dataclass
class Trace:
    """One request: what it holds, and what is known of it for its headers, metrics and log line."""

    request_id: str
    held: Pass
    started: float = field(default_factory=time.monotonic)
    key: str | None = None
    images: int = 0
    texts: int = 0
    code: str = ""
    labels_digest: str | None = None
    stages: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        """Seconds more in a stage."""
        self.stages[stage] = self.stages.get(stage, 0.0) + max(0.0, seconds)


class Service:
    """The operations behind the routes. One for each ingress; `start` it in the event loop that serves.

    Raises `ApiError` for everything that a caller can be told.
    """

    def __init__(self, config: EndpointConfig, model: Model) -> None:
        self.config = config
        self.model = model
        self.name = config.model_name()
        self.metrics = IngressMetrics()
        self.gate = Gate(config.limits)
        self.fetcher = Fetcher(config.fetch)
        self.questions: dict[str, Question] = {}
        self.cache = LabelCache(self._embed_prompts, config.limits.cached_labels)
        self.about: ModelAbout
        self._decoders: DecoderPool
        self._images: Batcher[tuple[NDArray[np.uint8], float], _Vector]
        self._flushing: asyncio.Task[None]

    async def start(self) -> None:
        """Wait for the model, start the decoders and embed the registered label sets. Warm afterwards."""
        async with asyncio.timeout(START_SECONDS):
            self.about = await self.model.describe()
        config = self.config
        processes = config.ingress.decoder_processes()
        self._decoders = DecoderPool(self.about.spec, config.limits.image, config.decode, processes)
        self._images = Batcher(
            self._send_images,
            self.about.batch_size,
            wait=config.batching.wait_ms / 1000,
            runners=CALLS_PER_REPLICA * config.replicas.largest,
        )
        self._flushing = asyncio.create_task(self._flush())
        # A process starts with its first image: it pays for the imports here.
        await asyncio.gather(*(self._decoders.decode([b"?"], time.monotonic() + 60) for _ in range(processes)))
        for name, labels in config.label_sets.items():
            self.questions[name] = await embed_question(labels, self.rule, self._embed_prompts)

    async def close(self) -> None:
        """Stop the decoders, close connections."""
        self._flushing.cancel()
        self._images.close()
        self._decoders.close()
        await self.fetcher.aclose()

    async def check_ready(self) -> None:
        """Raises `ApiError` (unavailable) when the model does not answer now."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self.model.check_ready()
        except (TimeoutError, ModelStuck):
            raise ApiError("unavailable", "the model does not answer", retry_after=READY_SECONDS) from None

    @property
    def rule(self) -> Family:
        """The text rules of the model's family."""
        return FAMILIES[self.about.family]

    def fingerprint(self, labels_digest: str | None = None) -> Fingerprint:
        """What decided an answer's numbers."""
        return Fingerprint(model=self.about.weights, labels=labels_digest)

    def usage(self, trace: Trace) -> Usage:
        """What an answer cost."""
        tokens = trace.texts * self.about.text_length
        return Usage(prompt_tokens=tokens, total_tokens=tokens, images=trace.images)

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` when a request names another model than this one."""
        if name is not None and name != self.name:
            raise ApiError("model_not_found", f"no model {name!r} here, only {self.name!r}", param="model")

    def check_width(self, dimensions: int | None, param: str) -> None:
        """Raises `ApiError` when a request wants embeddings of another width."""
        if dimensions is not None and dimensions != self.about.width:
            raise ApiError(
                "unsupported_dimensions",
                f"{param}: this model's embeddings have {self.about.width} dimensions and cannot be cut: leave it out",
                param=param,
            )

    async def read_images(self, sources: Sequence[str], params: Sequence[str], trace: Trace) -> list[bytes]:
        """Encoded images out of data: URIs, base64 or URLs. What is fetched counts like a body."""
        self._check_count(len(sources))
        limit, fetched = self.config.limits.body_bytes, 0

        def hold(count: int) -> None:
            nonlocal fetched
            fetched += count
            if fetched > limit:
                raise ApiError("body_too_large", f"the images behind the URLs have more than {limit} bytes together")
            self.gate.add_bytes(trace.held, count)

        return await read_images(sources, params, self.fetcher, hold)

    async def embed_images(self, images: Sequence[bytes], params: Sequence[str], trace: Trace) -> Floats:
        """Encoded images to float32 (N, D) of unit norm. `params` name the fields that they came from."""
        self._check_count(len(images))
        trace.images += len(images)
        self.gate.add(trace.held, len(images))
        done = await self._decoders.decode(images, trace.held.deadline)
        trace.add("queue", done.waited)
        trace.add("decode", done.ran)
        pixels = []
        for outcome, param in zip(done.results, params, strict=True):
            if isinstance(outcome, ImageRejected):
                self.metrics.count_reject(outcome.reason)
                raise image_error(outcome, param)
            pixels.append(outcome.pixels)
        deadline = trace.held.deadline
        queued = await self._images.submit([(image, deadline) for image in pixels], deadline)
        last = queued.results[-1]
        trace.add("batch", queued.waited + last.waited)
        trace.add("forward", last.ran)
        return np.asarray([embedded.vector for embedded in queued.results], np.float32)

    async def embed_texts(self, texts: Sequence[str], params: Sequence[str], trace: Trace) -> Floats:
        """Texts to float32 (N, D) of unit norm."""
        limits = self.config.limits
        if len(texts) > limits.texts:
            raise ApiError("too_many_texts", f"{len(texts)} texts, and at most {limits.texts} are taken at once")
        for text, param in zip(texts, params, strict=True):
            if len(text) > limits.text_characters:
                raise ApiError(
                    "text_too_long",
                    f"{param}: {len(text)} characters, and at most {limits.text_characters} are taken",
                    param=param,
                )
            _check_unicode(text, param)
            if not self.rule.canonicalize(text):
                raise ApiError("invalid_request", f"{param}: nothing of this text is left for the model", param=param)
        trace.texts += len(texts)
        self.gate.add(trace.held, len(texts))
        embedded = await self._call(self.model.embed_texts(list(texts), trace.held.left()))
        return self._record(embedded, trace)

    async def ask(self, question: LabelQuestion, trace: Trace) -> Question:
        """The label set that a request asks, embedded: registered, cached, or new."""
        if (question.labels is None) == (question.label_set is None):
            raise ApiError("invalid_request", "give exactly one of labels and label_set", param="labels")
        if question.label_set is not None:
            return self._registered(question, trace)
        assert question.labels is not None
        key = (tuple(question.labels), tuple(question.templates or (DEFAULT_TEMPLATE,)))
        found = self.cache.find(key)
        self.metrics.count_lookup(found is not None)
        if found is None:
            self._check_labels(*key)
            try:
                labels = LabelSet(names=key[0], templates=key[1], threshold=0.0, top_k=None)
                labels.check(self.rule)
            except ValueError as error:
                raise ApiError("invalid_request", _first_line(error), param="labels") from None
            count = len(key[0]) * len(key[1])
            trace.texts += count
            self.gate.add(trace.held, count)
            start = time.monotonic()
            found = await self.cache.build(key, labels, self.rule)
            trace.add("labels", time.monotonic() - start)
        trace.labels_digest = found.digest
        return found

    def classify(self, vectors: Floats, asked: Question, how: LabelQuestion) -> list[list[tuple[str, float]]]:
        """Embeddings (N, D) to each image's labels and scores, best first. The batch job's scoring."""
        logits = score_pairs(vectors, asked.texts, self.about.scale)
        scores = softmax(logits) if how.activation == "softmax" else sigmoid(logits)
        thresholds = asked.thresholds if how.threshold is None else how.threshold
        chosen, kept = select(scores, thresholds, how.top_k or asked.labels.top_k)
        names = asked.names
        return [
            [(names[i], float(score)) for i, score in zip(row, row_scores, strict=True)]
            for row, row_scores in zip(chosen, kept, strict=True)
        ]

    def _registered(self, question: LabelQuestion, trace: Trace) -> Question:
        if question.templates is not None:
            raise ApiError(
                "invalid_request", "templates: a registered label set has its own; send labels", param="templates"
            )
        found = self.questions.get(question.label_set or "")
        if found is None:
            known = ", ".join(self.questions) or "none is registered"
            message = f"no label set {question.label_set!r} (known: {known})"
            raise ApiError("label_set_not_found", message, param="label_set")
        self.metrics.count_lookup(True)
        trace.labels_digest = found.digest
        return found

    def _check_count(self, count: int) -> None:
        most = self.config.limits.images
        if count > most:
            raise ApiError("too_many_images", f"{count} images, and at most {most} are taken at once")

    def _check_labels(self, names: Sequence[str], templates: Sequence[str]) -> None:
        limits = self.config.limits
        count = len(names) * len(templates)
        if count > limits.labels:
            raise ApiError(
                "too_many_labels",
                f"{len(names)} labels with {len(templates)} template(s) make {count} prompts, and at most "
                f"{limits.labels} are taken: register larger sets in label_sets",
                param="labels",
            )
        for param, texts in (("labels", names), ("templates", templates)):
            for text in texts:
                _check_unicode(text, param)
                if len(text) > limits.label_characters:
                    raise ApiError(
                        "label_too_long",
                        f"{param}: one has {len(text)} characters, and at most {limits.label_characters} are taken",
                        param=param,
                    )

    async def _embed_prompts(self, prompts: Sequence[str]) -> Floats:
        embedded = await self._call(self.model.embed_texts(prompts, self.config.limits.deadline_s))
        return embedded.vectors

    async def _send_images(self, images: list[tuple[NDArray[np.uint8], float]]) -> list[_Vector]:
        """Several requests' images, each with its deadline, in one call: it costs more than the images in it."""
        seconds = max(deadline for _, deadline in images) - time.monotonic()
        pixels = np.stack([image for image, _ in images])
        embedded = await self._call(self.model.embed_images(pixels, seconds))
        return [_Vector(vector, embedded.waited, embedded.ran) for vector in embedded.vectors]

    async def _call(self, answer: Awaitable[Embedded]) -> Embedded:
        """What the model answers. Its own failures are the caller's to try again: its health check sees to it."""
        try:
            return await answer
        except (ApiError, Expired):
            raise
        except Exception as error:
            log.exception("the model failed")
            raise ApiError("unavailable", "the model failed on this request", retry_after=RETRY_AFTER) from error

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            self.metrics.flush(self.gate.items)

    def _record(self, embedded: Embedded, trace: Trace) -> Floats:
        trace.add("batch", embedded.waited)
        trace.add("forward", embedded.ran)
        return embedded.vectors


def _check_unicode(text: str, param: str) -> None:
    """JSON can write half of a surrogate pair, which is no text. Raises `ApiError`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError("invalid_request", f"{param}: half of a surrogate pair is no text", param=param) from None


def _first_line(error: ValueError) -> str:
    """The first complaint of a pydantic error, without its frame."""
    details = getattr(error, "errors", None)
    return str(details()[0]["msg"]).removeprefix("Value error, ") if details else str(error)
