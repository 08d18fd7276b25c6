"""Batches of texts: prompts that are cached or already being embedded are not sent to the model again."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from serve.admission.batcher import Interrupted
from serve.embedding.model_client import ModelClient
from serve.label_sets.prompts import PromptCache
from siglip.label_text.tokens import Reading
from siglip.scoring import Floats

NOT_READ = Reading(0, 0, 0, b"")


@dataclass(frozen=True)
class QueuedText:
    """A text to embed, and its deadline on the clock of `time.monotonic`.

    If `owner` is given, its embedding is cached for this owner (see `serve.label_sets.lru_cache`).
    """

    text: str
    deadline: float
    owner: str | None = None


@dataclass(frozen=True)
class ItemEmbedding:
    """An item's embedding (D,), and the seconds that its batch waited and ran in the replica.

    `reading` is what the model read of a text, `NOT_READ` for an image.
    """

    vector: Floats
    waited: float
    ran: float
    reading: Reading = NOT_READ


class TextBatchRunner:
    """Embeds batches of texts, each distinct text once.

    Several batches may run at the same time. A text that another batch is embedding is awaited, not sent again.
    It shares `prompts`, the cache of prompt embeddings, with the label cache.
    """

    def __init__(self, client: ModelClient, prompts: PromptCache) -> None:
        self._client = client
        self._prompts = prompts
        self._in_flight: dict[str, asyncio.Future[ItemEmbedding]] = {}

    async def run(self, batch: list[QueuedText]) -> list[ItemEmbedding]:
        """Embed several requests' texts in one call of the model, in the order of `batch`."""
        known: dict[str, ItemEmbedding | asyncio.Future[ItemEmbedding]] = {}
        send: list[str] = []
        seconds = max(item.deadline for item in batch) - time.monotonic()
        for item in batch:
            if item.text in known:
                continue
            cached = self._prompts.get(item.text) if item.owner is not None else None
            if cached is not None:
                known[item.text] = ItemEmbedding(cached.vector, 0.0, 0.0, cached.reading)
            elif item.text in self._in_flight:
                known[item.text] = self._in_flight[item.text]
            else:
                send.append(item.text)
                known[item.text] = self._in_flight[item.text] = asyncio.get_running_loop().create_future()
        if send:
            await self._send(send, seconds)
        done = {
            text: await embedding if isinstance(embedding, asyncio.Future) else embedding
            for text, embedding in known.items()
        }
        for item in batch:
            if item.owner is not None:
                self._prompts.put(item.text, done[item.text].vector, done[item.text].reading, item.owner)
        return [done[item.text] for item in batch]

    async def _send(self, texts: list[str], seconds: float) -> None:
        """Embed `texts` and resolve their futures, or fail all of them with the same error."""
        try:
            embedded = await self._client.embed_texts(texts, seconds)
            for text, vector, reading in zip(texts, embedded.vectors, embedded.list_readings(), strict=True):
                self._in_flight[text].set_result(ItemEmbedding(vector, embedded.waited, embedded.ran, reading))
        except BaseException as error:
            failed = error if isinstance(error, Exception) else Interrupted("the work was cancelled")
            for text in texts:
                self._in_flight[text].set_exception(failed)
                self._in_flight[text].exception()  # marks it as retrieved: perhaps no other batch waits for it
            raise
        finally:
            for text in texts:
                del self._in_flight[text]
