"""The search of an endpoint: embeds a query, waits for its turn in the queue, and follows the output's commits."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import numpy as np
import pybase64

from serve.context import RequestContext
from serve.embedding.embedder import Embedder
from serve.embedding.inputs import ImageReader
from serve.http.errors import RETRY_AFTER, ApiError
from serve.http.quoting import quote
from serve.label_sets.cache import LabelCache
from serve.log import log
from serve.model import ModelAbout
from serve.rayserve.metrics import IngressMetrics
from serve.search.config import SearchConfig
from serve.search.output import Query, Results, SearchedOutput
from serve.search.request import SearchQuery
from serve.search.texts import QueryTexts, explain_unreadable
from serve.worker import WorkerThread
from siglip.labels import LabelError
from siglip.scoring import Floats
from storage.settings import ConfigError
from storage.store import StoreError

Result = TypeVar("Result")
QUEUE = 64
"""Searches that an ingress holds at once, with those that wait for their turn. One key may hold half of them."""
PROBLEM = "the latest state of the output cannot be searched: the log of the endpoint says why"
"""What a client learns of a state that cannot be opened. The log has the reason, which may name folders and buckets."""
THUMBNAILS_A_STEP = 4
"""Thumbnails that are read before the next request has its turn: each may take a row group of the output."""


@dataclass(frozen=True)
class Searched:
    """The answer to a search: `thumbnails` are data: URIs, None for those that are too large, or None as a whole.

    `opened` is the state of the output that was searched. `labels` is the digest of the query's texts, if it has some.
    """

    results: Results
    opened: SearchedOutput
    thumbnails: list[str | None] | None
    labels: str | None


@dataclass(frozen=True)
class AsOf:
    """How new the searched state is. `problem` says that a newer one could not be opened."""

    opened_at: datetime
    checked_at: datetime
    problem: str | None


@dataclass(frozen=True)
class _Embedded:
    """A query with the averaged prompts of its texts, float32 (L, D), and the embeddings of its image, (1, D)."""

    query: Query
    texts: QueryTexts | None
    vectors: Floats | None
    examples: Sequence[Floats]
    thumbnails: bool


class SearchService:
    """Searches one output. A search stays on the state of the output that it began with.

    All searches of an ingress run in one thread, in turns of the keys. Another thread looks for new commits.
    """

    def __init__(
        self,
        config: SearchConfig,
        about: ModelAbout,
        embedder: Embedder,
        reader: ImageReader,
        cache: LabelCache,
        metrics: IngressMetrics,
    ) -> None:
        self._config = config
        self._about = about
        self._embedder = embedder
        self._reader = reader
        self._cache = cache
        self._metrics = metrics
        self._thread = WorkerThread("search")
        self._refresher = ThreadPoolExecutor(1, thread_name_prefix="search-refresh")
        self._refreshing = asyncio.Lock()
        self._held: Counter[str | None] = Counter()
        self._opened: SearchedOutput | None = None
        self._checked_at = datetime.now(UTC)
        self._problem = ""

    async def start(self) -> None:
        """Open the output. Raises `ConfigError` in one line if it cannot be searched, and `StoreError`."""
        self._opened = await self._in_refresher(partial(self._open, None))
        held = self._opened.bytes_held / 2**20
        log.info("search: %d images of %s, %.0f MiB held", self._opened.searched, self._opened.output.uri, held)

    async def watch(self) -> None:
        """Look for new commits until it is cancelled."""
        while True:
            await asyncio.sleep(self._config.refresh_seconds)
            await self.refresh()

    def close(self) -> None:
        """Stop the threads. Queued searches are never run."""
        self._thread.close()
        self._refresher.shutdown(wait=False, cancel_futures=True)

    @property
    def died(self) -> int:
        """Batch runners that ended and were replaced since the start."""
        return self._thread.died

    @property
    def opened(self) -> SearchedOutput:
        """The state of the output that new searches use. It exists once `start` has returned."""
        assert self._opened is not None
        return self._opened

    def tell_age(self, opened: SearchedOutput) -> AsOf:
        """Tell how new a state of the output is."""
        return AsOf(opened.opened_at, self._checked_at, PROBLEM if self._problem else None)

    async def refresh(self) -> None:
        """Open the output again if a run or a build of its index has ended. If that fails, the earlier state stays."""
        async with self._refreshing:
            try:
                changed = await self._in_refresher(partial(self._open_changed, self.opened))
            except Exception as error:
                expected = isinstance(error, (ConfigError, StoreError))
                line = str(error) if expected else f"an unexpected error: {type(error).__name__}"
                if line != self._problem:  # once, and not at each look
                    log.error("search: the earlier state is kept: %s", line, exc_info=not expected)
                self._problem = line
                self._metrics.count_refresh("failed")
                return
            self._problem, self._checked_at = "", datetime.now(UTC)
            self._metrics.count_refresh("unchanged" if changed is None else "changed")
            if changed is not None:
                self._opened = changed
                log.info("search: opened again, with %d images", changed.searched)

    async def search(self, asked: SearchQuery, context: RequestContext) -> Searched:
        """Search for a query. Raises `ApiError`, and `serve.admission.batcher.Expired`."""
        like = () if asked.like is None else (asked.like,)
        query = Query(
            asked.texts,
            asked.without,
            like=like,
            labels=asked.labels,
            top=asked.top,
            cutoff=asked.cutoff,
            fold=asked.fold,
        )
        with self._hold(context):
            opened = self.opened
            check_query(opened, query, asked.thumbnails)
            texts = QueryTexts.make(query, opened, self._about, self._embedder.limits)
            images = await self._reader.read([asked.image], ["image"], context) if asked.image is not None else []
            missing, cached = texts.count(self._cache) if texts else (0, 0)
            # A search itself counts as an item of the key's rate limit.
            await self._embedder.admit(context, len(images), missing, cached + 1, query.top)
            vectors = await self._embed_texts(texts, context) if texts else None
            examples = [await self._embedder.embed_images(images, ["image"], context)] if images else []
            embedded = _Embedded(query, texts, vectors, examples, asked.thumbnails)
            try:
                return await self._search(opened, embedded, context)
            except StoreError as error:
                log.error("search: %s", error)
            # A later run may have deleted files of this state: it is opened again, and searched once more.
            await self.refresh()
            if self.opened is opened or self.opened.templates != opened.templates:
                raise _unreadable()
            try:
                return await self._search(self.opened, embedded, context)
            except StoreError as error:
                log.error("search: %s", error)
                raise _unreadable() from None

    async def _search(self, opened: SearchedOutput, embedded: _Embedded, context: RequestContext) -> Searched:
        query, texts, examples = embedded.query, embedded.texts, list(embedded.examples)
        rows = []
        for name in query.like:
            embedding, position = await self._find_like(opened, name, context)
            examples.append(embedding)
            rows.append(position)
        together = np.concatenate([np.zeros((0, self._about.width), np.float32), *examples])
        terms = opened.make_terms(query, texts.labels if texts else None, embedded.vectors, together, rows)
        [results] = await self._run([partial(opened.search, query, terms)], "search", context)
        shown = await self._read_thumbnails(opened, results, context) if embedded.thumbnails else None
        return Searched(results, opened, shown, texts.digest if texts else None)

    async def _embed_texts(self, texts: QueryTexts, context: RequestContext) -> Floats:
        """Return the averaged prompts of a query's texts, (L, D). The caller has admitted them. Raises `ApiError`."""
        context.labels_digest = texts.digest
        if texts.known is not None:
            return texts.known
        embed = partial(self._embedder.embed_prompts, context=context)
        try:
            embedded = await self._cache.build(texts.key, texts.labels, self._about, embed, context.queue_key)
        except LabelError as error:
            raise explain_unreadable(error, texts.unwanted) from None
        context.truncated += embedded.truncated
        return embedded.head.vectors

    async def _find_like(self, opened: SearchedOutput, name: str, context: RequestContext) -> tuple[Floats, int]:
        [(ids, embedding, position)] = await self._run([partial(opened.find_like, name)], "search", context)
        if embedding is not None:
            return embedding, position
        message = f"like: no image has the key or id {quote(name)}"
        if ids:
            message = f"like: {len(ids)} images have this key: send the id of one of them: {', '.join(ids[:4])}"
        raise ApiError("invalid_request", message, param="like")

    async def _read_thumbnails(
        self, opened: SearchedOutput, results: Results, context: RequestContext
    ) -> list[str | None]:
        positions = results.positions.tolist()
        left = self._config.thumbnail_bytes
        shown: list[str | None] = []

        def take(found: list[bytes | None]) -> None:
            nonlocal left
            for one in found:
                fits = one is not None and len(one) <= left
                left -= len(one) if one is not None and fits else 0
                encoded = pybase64.b64encode(one).decode() if one is not None and fits else None
                shown.append(None if encoded is None else f"data:image/jpeg;base64,{encoded}")

        steps = [
            partial(opened.read_thumbnails, positions[start : start + THUMBNAILS_A_STEP])
            for start in range(0, len(positions), THUMBNAILS_A_STEP)
        ]
        if steps:
            await self._run(steps, "thumbnails", context, take)
        return shown

    async def _run(
        self,
        steps: Sequence[Callable[[], Result]],
        stage: str,
        context: RequestContext,
        check: Callable[[Result], None] = lambda result: None,
    ) -> list[Result]:
        """Run steps in the search's thread, until the request's deadline passes or its client leaves."""
        started = time.monotonic()
        try:
            return await self._thread.run(steps, context.permit.deadline, context.queue_key, check)
        finally:
            context.add(stage, time.monotonic() - started)

    @contextmanager
    def _hold(self, context: RequestContext) -> Iterator[None]:
        """Count a search while it is under way. Raises `ApiError` (overloaded) beyond `QUEUE`, or a key's half."""
        key = context.permit.key
        if self._held.total() >= QUEUE or (key is not None and self._held[key] >= QUEUE // 2):
            whose = "" if self._held.total() >= QUEUE else " of this key"
            raise ApiError("overloaded", f"too many searches{whose} are under way: try again", retry_after=RETRY_AFTER)
        self._held[key] += 1
        try:
            yield
        finally:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]

    def _open(self, before: SearchedOutput | None) -> SearchedOutput:
        return SearchedOutput.open(self._config.output, self._about.weights, before)

    def _open_changed(self, before: SearchedOutput) -> SearchedOutput | None:
        return None if before.is_current() else self._open(before)

    async def _in_refresher(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._refresher, function)


def check_query(opened: SearchedOutput, query: Query, thumbnails: bool) -> None:
    """Refuse what the output cannot answer. Raises `ApiError`, whose `param` is the field."""
    known = opened.labels
    if unknown := [label for label in query.labels if label not in known]:
        message = f"labels: the output has no label {quote(unknown[0])}: search for it with text"
        raise ApiError("invalid_request", message, param="labels")
    if thumbnails and not opened.has_thumbnails:
        message = "thumbnails: the output has none: its job had no `thumbnails`"
        raise ApiError("unsupported_search", message, param="thumbnails")


def _unreadable() -> ApiError:
    return ApiError("unavailable", "the searched output cannot be read now: try again", retry_after=RETRY_AFTER)
