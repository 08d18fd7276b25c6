"""What the endpoint does, whatever shape it was asked in: images and texts to embeddings, and to labels."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.admission.auth import Quota, RateLimiter
from serve.admission.batcher import Batcher, Expired, Interrupted
from serve.admission.controller import AdmissionController, Permit
from serve.config import EndpointConfig
from serve.decoder_pool import DecoderPool, TooManyPixels
from serve.fetch.fetcher import Fetcher
from serve.fetch.images import read_images
from serve.http.errors import ApiError, image_error
from serve.label_sets.cache import EmbeddedLabelSet, LabelCache, embed_label_set
from serve.label_sets.files import REREAD_SECONDS, LabelFiles
from serve.log import log
from serve.model import Embedded, Model, ModelAbout, ModelStuck
from serve.rayserve.metrics import FLUSH_SECONDS, IngressMetrics
from serve.schemas import Fingerprint, LabelQuery, LabelScore, Usage
from serve.tokens import TokenVocabulary
from siglip.families import FAMILIES, Family
from siglip.heads import name_bands
from siglip.images.decode import Decoded, ImageRejected
from siglip.labels import DEFAULT_TEMPLATE, LabelSet
from siglip.scoring import Floats, select, softmax

START_SECONDS = 3600.0
"""How long to wait for the model when starting: a node may have to come up, and weights to be fetched."""
READY_SECONDS = 5.0
RETRY_AFTER = 2.0
"""Seconds after which a request that the model failed on may come again."""
CALLS_PER_REPLICA = 2
"""Calls that an ingress has under way for each replica: one that is computed, and one that is ready to be. The queue
is therefore here, where it is known whose client has gone and whose deadline has passed."""


OTHER_MODEL_SECONDS, OTHER_MODEL_PATIENCE = 0.25, 0.5
"""How long to wait where a replica of another model answered, and for how long a request asks again."""
DEATH_SECONDS = 10.0
"""For how long an ingress is not ready after one of its runners ended: what ended it may end the next."""


@dataclass(frozen=True)
class _Text:
    """A text to embed, its deadline, and whether its embedding is to be kept."""

    text: str
    deadline: float
    keep: bool = False


@dataclass(frozen=True)
class _Vector:
    """An item's embedding (D,), and the seconds of its batch in the replica."""

    vector: Floats
    waited: float
    ran: float


@dataclass
class RequestContext:
    """One request: what it holds, and what is known of it for its headers, metrics and log line."""

    request_id: str
    held: Permit
    started: float = field(default_factory=time.monotonic)
    key: str | None = None
    images: int = 0
    texts: int = 0
    code: str = ""
    labels_digest: str | None = None
    stages: dict[str, float] = field(default_factory=dict)
    quotas: dict[str, Quota] = field(default_factory=dict)

    @property
    def turn(self) -> str:
        """Whose turn its work is taken in."""
        return self.key or ""

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
        self.admission = AdmissionController(config.limits)
        self.fetcher = Fetcher(config.fetch)
        self.vocabulary = TokenVocabulary(config.token_vocabulary) if config.token_vocabulary else None
        self.questions: dict[str, EmbeddedLabelSet] = {}
        self.cache = LabelCache(config.limits.cached_prompts)
        per_minute = config.auth.items_per_minute
        self.rates = RateLimiter(per_minute) if per_minute else None
        self.about: ModelAbout
        self._decoders: DecoderPool
        self._images: Batcher[tuple[NDArray[np.uint8], float], _Vector]
        self._texts: Batcher[_Text, _Vector]
        self._coming: dict[str, asyncio.Future[_Vector]] = {}
        self._deaths = (0, 0.0)
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Wait for the model, start the decoders and embed the registered label sets. Warm afterwards."""
        config = self.config
        async with asyncio.timeout(START_SECONDS):
            # While a changed configuration is rolled out, replicas of the one before answer too.
            while (about := await self.model.describe()).config != config.model_digest():
                await asyncio.sleep(OTHER_MODEL_SECONDS)
        self.about = about
        processes = config.ingress.decoder_processes()
        self._decoders = DecoderPool(
            self.about.spec, config.limits.image, config.decode, processes, self.admission.decoding
        )
        places = config.replicas.largest
        calls = CALLS_PER_REPLICA * places
        self._images = Batcher(
            self._send_images,
            self.about.batch_size,
            wait=config.batching.wait_ms / 1000,
            coming=self._decoders.count,
            runners=calls,
            places=places,
            meter=self.admission.images,
        )
        self._texts = Batcher(
            self._send_texts, self.about.text_batch, runners=calls, places=places, meter=self.admission.texts
        )
        self._background = [asyncio.create_task(self._flush())]
        # A process starts with its first image: it pays for the imports here.
        await asyncio.gather(*(self._decoders.decode([b"?"], 1, time.monotonic() + 60) for _ in range(processes)))
        self.admission.decoding.forget()
        files = LabelFiles(config.label_sources)
        for name, labels in config.label_sets.items():
            self.questions[name] = await embed_label_set(labels, self.about, self._embed_registered)
        if config.label_sources:
            self._background.append(asyncio.create_task(self._watch_labels(files)))

    async def close(self) -> None:
        """Stop the decoders, close connections."""
        for task in self._background:
            task.cancel()
        self._images.close()
        self._texts.close()
        self._decoders.close()
        await self.fetcher.aclose()

    async def check_ready(self) -> None:
        """Raises `ApiError` (unavailable) when the model does not answer now, or a batch runner ended lately."""
        if self._count_deaths():
            raise ApiError("unavailable", "a batch runner ended", retry_after=DEATH_SECONDS)
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

    def usage(self, context: RequestContext) -> Usage:
        """What an answer cost."""
        tokens = context.texts * self.about.text_length
        return Usage(prompt_tokens=tokens, total_tokens=tokens, images=context.images)

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

    async def read_images(self, sources: Sequence[str], params: Sequence[str], context: RequestContext) -> list[bytes]:
        """Encoded images out of data: URIs, base64 or URLs. What is fetched counts like a body."""
        self._check_count(len(sources))
        limit, fetched = self.config.limits.body_bytes, 0

        def hold(count: int) -> None:
            nonlocal fetched
            fetched += count
            if fetched > limit:
                raise ApiError("body_too_large", f"the images behind the URLs have more than {limit} bytes together")
            self.admission.add_bytes(context.held, count)

        return await read_images(sources, params, self.fetcher, context.turn, hold)

    async def embed_images(self, images: Sequence[bytes], params: Sequence[str], context: RequestContext) -> Floats:
        """Encoded images to float32 (N, D) of unit norm. `params` name the fields that they came from."""
        self._check_count(len(images))
        context.images += len(images)
        self._admit(context, images=len(images))
        deadline = context.held.deadline
        try:
            done = await self._decoders.decode(images, self.config.limits.pixels, deadline, context.turn)
        except TooManyPixels:
            raise ApiError(
                "too_many_pixels_together",
                f"the images have more than {self.config.limits.pixels} pixels together: send fewer, or smaller ones",
            ) from None
        context.add("queue", done.waited)
        context.add("decode", done.ran)
        for outcome, param in zip(done.results, params, strict=True):
            if isinstance(outcome, ImageRejected):
                self.metrics.count_reject(outcome.reason)
                raise image_error(outcome, param)
        pixels = [outcome.pixels for outcome in done.results if isinstance(outcome, Decoded)]
        return await self._submit(self._images, [(image, deadline) for image in pixels], context)

    async def embed_texts(self, texts: Sequence[str], params: Sequence[str], context: RequestContext) -> Floats:
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
        context.texts += len(texts)
        self._admit(context, texts=len(texts))
        return await self._submit(self._texts, [_Text(text, context.held.deadline) for text in texts], context)

    async def ask(self, question: LabelQuery, context: RequestContext) -> EmbeddedLabelSet:
        """The label set that a request asks, embedded: registered, cached, or new."""
        if (question.labels is None) == (question.label_set is None):
            raise ApiError("invalid_request", "give exactly one of labels and label_set", param="labels")
        if question.label_set is not None:
            return self._registered(question, context)
        assert question.labels is not None
        key = (tuple(question.labels), tuple(question.templates or (DEFAULT_TEMPLATE,)))
        found = self.cache.questions.find(key)
        self.metrics.count_lookup(found is not None)
        if found is None:
            self._check_labels(*key)
            try:
                labels = LabelSet(names=key[0], templates=key[1], threshold=0.0, top_k=None)
                labels.check(self.rule)
            except ValueError as error:
                raise ApiError("invalid_request", _first_line(error), param="labels") from None
            count = len(self.cache.missing(labels, self.rule))
            context.texts += count
            self._admit(context, texts=count)

            async def embed(prompts: Sequence[str]) -> Floats:
                texts = [_Text(prompt, context.held.deadline, keep=True) for prompt in prompts]
                return await self._submit(self._texts, texts, context)

            start = time.monotonic()
            found = await self.cache.build(key, labels, self.about, embed)
            context.add("labels", time.monotonic() - start)
        context.labels_digest = found.digest
        return found

    def classify(self, vectors: Floats, asked: EmbeddedLabelSet, how: LabelQuery) -> list[list[LabelScore]]:
        """Embeddings (N, D) to each image's labels and scores, best first. The batch job's scoring."""
        softened = how.activation == "softmax"
        scores = softmax(asked.head.logits(vectors)) if softened else asked.head.scores(vectors)
        # A set's thresholds and bands are for its own scores, which softmax's are not.
        thresholds = np.zeros(len(asked.names), np.float32) if softened else asked.thresholds
        if how.threshold is not None:
            thresholds = np.full(len(asked.names), how.threshold, np.float32)
        answers = []
        for chosen, kept in select(scores, thresholds, how.top_k or asked.labels.top_k).rows():
            bands = (
                name_bands(chosen, kept, asked.labels).tolist() if asked.has_bands and not softened else repeat(None)
            )
            found = zip(chosen, kept.tolist(), bands, strict=False)
            answers.append([LabelScore(label=asked.names[i], score=score, band=band) for i, score, band in found])
        return answers

    def _registered(self, question: LabelQuery, context: RequestContext) -> EmbeddedLabelSet:
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
        context.labels_digest = found.digest
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

    def _admit(self, context: RequestContext, images: int = 0, texts: int = 0) -> None:
        """Let a request's work in, and charge its key for it. Raises `ApiError`."""
        self.admission.add(context.held, images, texts)
        if self.rates is None or context.key is None:
            return
        quota = context.quotas["items"] = self.rates.check(context.key, images + texts)
        if not quota.allowed:
            raise ApiError(
                "rate_limit_exceeded",
                f"this key may send {quota.limit} images and texts a minute; come back in {quota.retry_after_s:.1f} s",
                retry_after=quota.retry_after_s,
            )

    async def _submit(self, batcher: Batcher[Any, _Vector], items: Sequence[Any], context: RequestContext) -> Floats:
        """Items through a batcher to the model: float32 (N, D)."""
        try:
            queued = await batcher.submit(items, context.held.deadline, context.turn)
        except Interrupted:
            raise ApiError("unavailable", "the work was cancelled: try again", retry_after=RETRY_AFTER) from None
        last = queued.results[-1]
        context.add("batch", queued.waited + last.waited)
        context.add("forward", last.ran)
        return np.asarray([embedded.vector for embedded in queued.results], np.float32)

    async def _embed_registered(self, prompts: Sequence[str]) -> Floats:
        """Prompts cut where the encoder would cut them, so that the numbers are the batch job's."""
        size = self.about.text_batch
        pieces = [
            await self._call(
                partial(self.model.embed_texts, prompts[start : start + size], START_SECONDS), START_SECONDS
            )
            for start in range(0, len(prompts), size)
        ]
        return np.concatenate([embedded.vectors for embedded in pieces])

    async def _send_images(self, images: list[tuple[NDArray[np.uint8], float]]) -> list[_Vector]:
        """Several requests' images, each with its deadline, in one call: it costs more than the images in it."""
        seconds = max(deadline for _, deadline in images) - time.monotonic()
        pixels = np.stack([image for image, _ in images])
        embedded = await self._call(partial(self.model.embed_images, pixels, seconds))
        return [_Vector(vector, embedded.waited, embedded.ran) for vector in embedded.vectors]

    async def _send_texts(self, texts: list[_Text]) -> list[_Vector]:
        """Several requests' texts in one call, each prompt that is to be kept once for all who want it."""
        known: dict[str, _Vector | asyncio.Future[_Vector]] = {}
        send: list[str] = []
        seconds = max(text.deadline for text in texts) - time.monotonic()
        for item in texts:
            if item.text in known:
                continue
            kept = self.cache.prompts.find(item.text) if item.keep else None
            if kept is not None:
                known[item.text] = _Vector(kept, 0.0, 0.0)
            elif item.text in self._coming:
                known[item.text] = self._coming[item.text]
            else:
                send.append(item.text)
                known[item.text] = self._coming[item.text] = asyncio.get_running_loop().create_future()
        try:
            if send:
                embedded = await self._call(partial(self.model.embed_texts, send, seconds))
                for text, vector in zip(send, embedded.vectors, strict=True):
                    self._coming[text].set_result(_Vector(vector, embedded.waited, embedded.ran))
        except BaseException as error:
            failed = error if isinstance(error, Exception) else Interrupted("the work was cancelled")
            for text in send:
                self._coming[text].set_exception(failed)
                self._coming[text].exception()  # others may wait for it, or nobody
            raise
        finally:
            for text in send:
                del self._coming[text]
        vectors = {
            text: await vector if isinstance(vector, asyncio.Future) else vector for text, vector in known.items()
        }
        for item in texts:
            if item.keep:
                self.cache.prompts.keep(item.text, vectors[item.text].vector)
        return [vectors[item.text] for item in texts]

    async def _call(self, ask: Callable[[], Awaitable[Embedded]], patience: float = OTHER_MODEL_PATIENCE) -> Embedded:
        """What the model answers. Its own failures are the caller's to try again: its health check sees to it.

        Embeddings of other weights than this ingress knows would be compared with labels of these and scored with their
        scale. They are of a replica of another configuration, before or after this one, and for `patience` seconds
        another replica is asked.
        """
        until = time.monotonic() + patience
        while (embedded := await self._ask(ask)).weights != self.about.weights:
            if time.monotonic() >= until:
                log.warning("a replica has the model %s, not %s", embedded.weights[:16], self.about.weights[:16])
                raise ApiError("unavailable", "the endpoint is changing its model: try again", retry_after=RETRY_AFTER)
            await asyncio.sleep(OTHER_MODEL_SECONDS)
        return embedded

    async def _ask(self, ask: Callable[[], Awaitable[Embedded]]) -> Embedded:
        try:
            return await ask()
        except (ApiError, Expired):
            raise
        except Exception as error:
            log.exception("the model failed")
            raise ApiError("unavailable", "the model failed on this request", retry_after=RETRY_AFTER) from error

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            self._count_deaths()
            self.metrics.flush(self.admission.held.items)

    async def _watch_labels(self, files: LabelFiles) -> None:
        """Take registered label sets anew when their files change. One that is bad leaves the set before."""
        while True:
            await asyncio.sleep(REREAD_SECONDS)
            for name, content in files.changed():
                try:
                    labels = files.parse(name)
                    labels.check(self.rule)
                    question = await embed_label_set(labels, self.about, self._embed_registered)
                except (ApiError, Expired):
                    continue  # the model does not answer now: next time
                except ValueError as error:
                    log.error("label set %s: its file changed and is no good: %s", name, _first_line(error))
                    self.metrics.count_bad_labels()
                    files.take(name, content)
                    continue
                self.questions[name] = question
                files.take(name, content)
                log.info("label set %s: taken anew, with %d labels", name, len(labels.names))

    def _count_deaths(self) -> bool:
        """Whether a batch runner ended lately. They are counted in the metrics."""
        died = self._images.died + self._texts.died + self._decoders.died
        before, _ = self._deaths
        if died > before:
            self.metrics.count_deaths(died - before)
            self._deaths = died, time.monotonic()
        return self._deaths[0] > 0 and time.monotonic() - self._deaths[1] < DEATH_SECONDS


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
