"""Embeddings of a request's images and texts: decoding, batching and calls of the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.admission.auth import RateLimiter
from serve.admission.batcher import Batcher, Interrupted
from serve.admission.controller import AdmissionController
from serve.admission.load import Load
from serve.config import EndpointConfig
from serve.context import RequestContext
from serve.decoder_pool import DecoderPool, TooManyPixels
from serve.embedding.inputs import CUT, CheckedText, Truncation, check_image_count, check_texts
from serve.embedding.model_client import ModelClient
from serve.embedding.text_batch import ItemEmbedding, QueuedText, TextBatchRunner
from serve.http.errors import RETRY_AFTER, ApiError, image_error
from serve.label_sets.prompts import EmbeddedPrompts, PromptCache
from serve.rayserve.metrics import IngressMetrics
from siglip.families import FAMILIES
from siglip.images.decode import Decoded, ImageRejected
from siglip.scoring import Floats

CALLS_PER_REPLICA = 2
"""Calls that an ingress has under way for each replica: one is computed while the next is ready. All other work queues
in the ingress, which knows which clients have disconnected and which deadlines have passed."""


class Embedder:
    """Turns a request's encoded images and texts into embeddings, in batches shared with other requests.

    It checks limits, reserves capacity for the items, charges the key's rate limit and adds up the stages' seconds in
    the request's context. It knows no routes.
    """

    def __init__(
        self,
        config: EndpointConfig,
        client: ModelClient,
        decoders: DecoderPool,
        admission: AdmissionController,
        metrics: IngressMetrics,
        prompts: PromptCache,
    ) -> None:
        self.limits = config.limits
        self._client = client
        self._family = FAMILIES[client.about.family]
        self._decoders = decoders
        self._admission = admission
        self._metrics = metrics
        per_minute = config.auth.items_per_minute
        self._rates = RateLimiter(per_minute) if per_minute else None
        replicas = config.replicas.largest
        runners = CALLS_PER_REPLICA * replicas
        self._images: Batcher[tuple[NDArray[np.uint8], float], ItemEmbedding] = Batcher(
            self._run_images,
            client.about.batch_size,
            wait=config.batching.wait_ms / 1000,
            coming=decoders.count,
            runners=runners,
            places=replicas,
            service_time=admission.images,
        )
        self._texts: Batcher[QueuedText, ItemEmbedding] = Batcher(
            TextBatchRunner(client, prompts).run,
            client.about.text_batch,
            runners=runners,
            places=replicas,
            service_time=admission.texts,
            share=admission.share_of_texts,
        )

    @property
    def died(self) -> int:
        """Batch runners that ended and were replaced since the start."""
        return self._images.died + self._texts.died

    def close(self) -> None:
        """Stop the batch runners. Queued work is never completed."""
        self._images.close()
        self._texts.close()

    async def embed_images(self, images: Sequence[bytes], params: Sequence[str], context: RequestContext) -> Floats:
        """Embed encoded images: float32 (N, D) of unit norm. `params` name the request's fields that they came from.

        The caller has admitted them. Raises `ApiError`, also for the first image that cannot be decoded, and `Expired`.
        """
        deadline = context.permit.deadline
        try:
            done = await self._decoders.decode(
                images, self.limits.pixels, deadline, context.queue_key, context.count_decoded
            )
        except Interrupted:
            raise ApiError("unavailable", "the decoding was cancelled: try again", retry_after=RETRY_AFTER) from None
        except TooManyPixels:
            raise ApiError(
                "too_many_pixels_together",
                f"the images have more than {self.limits.pixels} pixels together: send fewer, or smaller ones",
            ) from None
        context.add("queue", done.waited)
        context.add("decode", done.ran)
        for outcome, param in zip(done.results, params, strict=True):
            if isinstance(outcome, ImageRejected):
                self._metrics.count_reject(outcome.reason)
                raise image_error(outcome, param)
        pixels = [outcome.pixels for outcome in done.results if isinstance(outcome, Decoded)]
        return _stack(await self._submit(self._images, [(image, deadline) for image in pixels], context))

    async def check_texts(
        self, texts: Sequence[str], params: Sequence[str], context: RequestContext, truncation: Truncation = CUT
    ) -> list[CheckedText]:
        """Check texts before they are admitted. `params` name the request's fields that they came from.

        Raises `ApiError`, also for texts with so many characters that `truncation` refuses them.
        """
        size = sum(map(len, texts))
        checked = await context.work(check_texts, texts, params, self.limits, self._family, size=size)
        longest = self._client.about.text_length
        for text in checked:
            if text.is_cut:
                truncation.check(longest + 1, longest, text.param)
        return checked

    async def embed_texts(
        self, texts: Sequence[CheckedText], context: RequestContext, truncation: Truncation = CUT
    ) -> Floats:
        """Embed texts: float32 (N, D) of unit norm. The caller has checked and admitted them.

        Adds the texts that were cut to the context, or refuses them, as `truncation` says. Raises `ApiError` and
        `Expired`.
        """
        longest = self._client.about.text_length
        queued = [QueuedText(text.text, context.permit.deadline) for text in texts]
        done = await self._submit(self._texts, queued, context, context.count_embedded)
        for text, embedded in zip(texts, done, strict=True):
            truncation.check(embedded.reading.tokens, longest, text.param)
            context.count_text(embedded.reading.tokens, longest, text.is_cut)
        return _stack(done)

    async def embed_prompts(self, prompts: Sequence[str], context: RequestContext) -> EmbeddedPrompts:
        """Embed prompts and cache their embeddings. The caller has admitted them. Raises `ApiError` and `Expired`."""
        texts = [QueuedText(prompt, context.permit.deadline, context.queue_key) for prompt in prompts]
        done = await self._submit(self._texts, texts, context, context.count_embedded)
        longest = self._client.about.text_length
        context.tokens += sum(min(one.reading.tokens, longest) for one in done)
        return EmbeddedPrompts(_stack(done), [one.reading for one in done])

    async def admit(
        self, context: RequestContext, images: int = 0, texts: int = 0, cached: int = 0, pairs: int = 0
    ) -> None:
        """Reserve capacity for all of a request's items, and charge them to its key's rate limit. Call it once.

        `pairs` is the number of labels or matches in the response. `cached` is the number of texts whose embeddings are
        cached: they need no capacity, but count for the rate limit. Waits until there is capacity. Raises `ApiError`.
        """
        check_image_count(images, self.limits)
        if pairs > self.limits.pairs:
            raise ApiError(
                "too_many_pairs",
                f"the response would have {pairs} labels or matches; the limit is {self.limits.pairs}: ask for fewer "
                "(top_k), or send fewer images or texts",
            )
        load = Load(images=images, texts=texts, pairs=pairs)
        self._admission.check(context.permit, load)
        if self._rates is not None and context.key is not None:
            quota = context.quotas["items"] = self._rates.check(context.key, load.items + cached)
            if not quota.allowed:
                raise ApiError(
                    "rate_limit_exceeded",
                    f"this key may send {quota.limit} images and texts a minute; come back in "
                    f"{quota.retry_after_s:.1f} s",
                    retry_after=quota.retry_after_s,
                )
            context.charged = min(load.items + cached, quota.limit)
        context.images += images
        context.texts += texts
        start = time.monotonic()
        await self._admission.reserve(context.permit, load)
        context.add("admission", time.monotonic() - start)

    def settle(self, context: RequestContext) -> None:
        """Charge a refused request's key for the work that was begun, and give back the rest of what was charged.

        An image that was fetched or decoded, and a text that was given to the model, count. Cached prompts and labels
        or matches of the response do not.
        """
        if self._rates is not None and context.key is not None and context.charged != context.begun:
            context.quotas["items"] = self._rates.settle(context.key, context.charged - context.begun)
            context.charged = context.begun

    async def _submit(
        self,
        batcher: Batcher[Any, ItemEmbedding],
        items: Sequence[Any],
        context: RequestContext,
        begun: Callable[[], None] = lambda: None,
    ) -> list[ItemEmbedding]:
        """Queue items and wait for their embeddings, in order. `begun` is called for each when the model gets it."""
        try:
            done = await batcher.submit(items, context.permit.deadline, context.queue_key, begun)
        except Interrupted:
            raise ApiError("unavailable", "the work was cancelled: try again", retry_after=RETRY_AFTER) from None
        last = done.results[-1]
        context.add("batch", done.waited + last.waited)
        context.add("forward", last.ran)
        return done.results

    async def _run_images(self, images: list[tuple[NDArray[np.uint8], float]]) -> list[ItemEmbedding]:
        """Embed several requests' images, each with its deadline, in one call: a call costs more than its images."""
        seconds = max(deadline for _, deadline in images) - time.monotonic()
        pixels = np.stack([image for image, _ in images])
        embedded = await self._client.embed_images(pixels, seconds)
        return [ItemEmbedding(vector, embedded.waited, embedded.ran) for vector in embedded.vectors]


def _stack(embeddings: Sequence[ItemEmbedding]) -> Floats:
    """The embeddings of items as float32 (N, D)."""
    return np.asarray([embedding.vector for embedding in embeddings], np.float32)
