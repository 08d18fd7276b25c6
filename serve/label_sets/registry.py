"""The label sets that requests can use: registered ones, which are watched, and those that a request brings along."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial

from serve.admission.batcher import Expired
from serve.config import EndpointConfig
from serve.context import RequestContext
from serve.embedding.embedder import Embedder
from serve.embedding.inputs import check_labels
from serve.embedding.model_client import ModelClient
from serve.http.errors import ApiError
from serve.http.quoting import quote
from serve.label_sets.cache import EmbeddedLabelSet, LabelCache, LabelKey, embed_label_set, make_key
from serve.label_sets.files import REREAD_SECONDS, LabelFiles
from serve.label_sets.request_labels import explain_label_error, make_label_set
from serve.log import log
from serve.rayserve.metrics import IngressMetrics
from serve.schemas import LabelQuery
from siglip.families import FAMILIES
from siglip.labels import DEFAULT_TEMPLATE, LabelError, LabelSet


@dataclass(frozen=True)
class RegisteredLabelSet:
    """A label set of the configuration, and the same embedded."""

    labels: LabelSet
    embedded: EmbeddedLabelSet


@dataclass(frozen=True)
class FoundLabels:
    """A query's label set: `embedded`, or the `labels` to embed, which are to be cached under `key`.

    `missing` is the number of its prompts that have to be embedded, and `cached` the number of those that are cached.
    Both are 0 for a registered label set.
    """

    embedded: EmbeddedLabelSet | None
    key: LabelKey = b""
    labels: LabelSet | None = None
    missing: int = 0
    cached: int = 0

    def count_selected(self, top_k: int | None) -> int:
        """Return the largest number of labels that one image may get, where a request asks for `top_k`."""
        if self.embedded is not None:
            return self.embedded.count_selected(top_k)
        assert self.labels is not None
        return min(len(self.labels.names), top_k or len(self.labels.names))


class LabelSetRegistry:
    """Finds the embedded label set of a request, and embeds new ones.

    `registered` has the label sets of the configuration by name. Label sets of requests are kept in an LRU cache.
    """

    def __init__(
        self,
        config: EndpointConfig,
        client: ModelClient,
        embedder: Embedder,
        cache: LabelCache,
        metrics: IngressMetrics,
    ) -> None:
        self.registered: dict[str, RegisteredLabelSet] = {}
        self._config = config
        self._client = client
        self._family = FAMILIES[client.about.family]
        self._embedder = embedder
        self._cache = cache
        self._metrics = metrics
        self._files = LabelFiles(config.label_sources)  # before the sets are embedded: a later change is seen

    async def embed_registered(self) -> None:
        """Embed the configuration's label sets. Raises `ApiError` and `siglip.labels.LabelError`."""
        for name, labels in self._config.label_sets.items():
            self.registered[name] = await self._embed(name, labels)

    async def watch_files(self) -> None:
        """Embed a registered label set again whenever its file changes; runs until it is cancelled.

        A bad file is logged once and counted in the metrics, and the previous label set stays in use. This holds for
        any exception, so that the files of other label sets are still read.
        """
        while True:
            await asyncio.sleep(REREAD_SECONDS)
            for name, content in self._files.list_changes():
                try:
                    labels = self._files.parse(name)
                    labels.check(self._family)
                    label_set = await self._embed(name, labels)
                except (ApiError, Expired):
                    continue  # the model does not respond now: try again at the next reading
                except Exception as error:
                    expected = isinstance(error, ValueError)
                    reason = _first_message(error) if expected else "an unexpected error"
                    log.error(
                        "label set %s: its file changed and cannot be used: %s", name, reason, exc_info=not expected
                    )
                    self._metrics.count_bad_labels()
                    self._files.mark_seen(name, content)
                    continue
                self.registered[name] = label_set
                self._files.mark_seen(name, content)
                log.info("label set %s: read again, with %d labels", name, len(labels.names))

    def find(self, query: LabelQuery) -> FoundLabels:
        """Find the label set of a query: registered, cached, or still to be embedded (`embed`). Raises `ApiError`."""
        if (query.labels is None) == (query.label_set is None):
            raise ApiError("invalid_request", "give exactly one of labels and label_set", param="labels")
        if query.labels is None:
            return FoundLabels(self._find_registered(query))
        names, templates = query.labels, query.templates or (DEFAULT_TEMPLATE,)
        check_labels(names, templates, self._config.limits)
        key = make_key(names, templates)
        prompts = len(names) * len(templates)
        cached = self._cache.label_sets.get(key)
        self._metrics.count_lookup(cached is not None)
        if cached is not None:
            return FoundLabels(cached, cached=prompts)
        labels = make_label_set(names, templates, self._family)
        missing = len(self._cache.find_missing(labels, self._family))
        return FoundLabels(None, key, labels, missing, prompts - missing)

    async def embed(self, found: FoundLabels, context: RequestContext) -> EmbeddedLabelSet:
        """Return the embedded label set that was found, or embed and cache it. The caller has admitted its prompts.

        Sets the context's `labels_digest`. Raises `ApiError` and `Expired`.
        """
        label_set = found.embedded
        if label_set is None:
            start = time.monotonic()
            embed = partial(self._embedder.embed_prompts, context=context)
            assert found.labels is not None
            owner = context.queue_key
            try:
                label_set = await self._cache.build(found.key, found.labels, self._client.about, embed, owner)
            except LabelError as error:
                raise explain_label_error(error) from None
            context.add("labels", time.monotonic() - start)
        context.labels_digest = label_set.digest
        context.truncated += label_set.truncated
        return label_set

    def _find_registered(self, query: LabelQuery) -> EmbeddedLabelSet:
        if query.templates is not None:
            raise ApiError(
                "invalid_request",
                "templates: a registered label set has its own templates; send labels instead of label_set",
                param="templates",
            )
        found = self.registered.get(query.label_set or "")
        if found is None:
            known = ", ".join(self.registered) or "none is registered"
            message = f"no label set {quote(query.label_set or '')} (known: {known})"
            raise ApiError("label_set_not_found", message, param="label_set")
        self._metrics.count_lookup(True)
        return found.embedded

    async def _embed(self, name: str, labels: LabelSet) -> RegisteredLabelSet:
        embedded = await embed_label_set(labels, self._client.about, self._client.embed_registered)
        if embedded.warning:
            log.warning("label set %s: %s", name, embedded.warning)
        return RegisteredLabelSet(labels, embedded)


def _first_message(error: Exception) -> str:
    """The first message of a pydantic error, without pydantic's frame; the text of any other error."""
    details = getattr(error, "errors", None)
    return str(details()[0]["msg"]).removeprefix("Value error, ") if details else str(error)
