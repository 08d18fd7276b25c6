"""Embedded label sets: how one is made of a label set's prompts, and the cache of those that requests bring along."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from serve.label_sets.lru_cache import LRUCache
from serve.label_sets.prompts import ENTRY_BYTES, EmbeddedPrompts, PromptCache
from serve.model import ModelAbout
from siglip.families import FAMILIES
from siglip.heads import LinearHead, accept_thresholds, build_head
from siglip.label_text.tokens import LabelReadings, Reading
from siglip.labels import LabelSet, TextRule
from siglip.scoring import Floats, average_prompts

EmbedPrompts = Callable[[Sequence[str]], Awaitable[EmbeddedPrompts]]
"""Prompts to their embeddings of unit norm."""
LabelKey = bytes
"""A digest of a request's label names and templates, as the client wrote them."""


@dataclass(frozen=True)
class EmbeddedLabelSet:
    """A label set with its linear head. Row i of the head, of `thresholds` and of `accepts` belongs to `names[i]`.

    `digest` has the first 16 hexadecimal digits of `LabelSet.digest`. `top_k` and `accepts`, the scores of the band
    `accept`, are None if the label set has none. `truncated` is the number of its prompts whose ends the model did not
    read. `warning` says of which prompts the model did not know all characters, None if it knew them. It does not keep
    the prompts.
    """

    names: list[str]
    digest: str
    head: LinearHead
    thresholds: Floats
    top_k: int | None
    accepts: Floats | None
    truncated: int
    warning: str | None

    def count_selected(self, top_k: int | None) -> int:
        """Return the largest number of labels that one image may get, where a request asks for `top_k`."""
        return min(len(self.names), top_k or self.top_k or len(self.names))

    def count_bytes(self) -> int:
        """Return about how many bytes of memory this object takes."""
        names = sum(map(sys.getsizeof, self.names)) + sys.getsizeof(self.names)
        arrays = (self.head.vectors, self.head.gain, self.head.offset, self.thresholds)
        return names + sum(array.nbytes for array in arrays) + 3 * ENTRY_BYTES


class LabelCache:
    """LRU caches of prompts' embeddings and of the embedded label sets that requests bring along.

    `prompts` maps a prompt to its embedding, float32 (D,). `label_sets` maps a request's label names and templates to
    the embedded label set. Each has half of `capacity`, which is in bytes.

    A prompt is cached as soon as it is embedded, even if the request has ended by then. A client that repeats a request
    after its deadline therefore finds the prompts that were embedded so far, and label sets that overlap share prompts.
    """

    def __init__(self, capacity: int) -> None:
        self.prompts = PromptCache(capacity // 2)
        self.label_sets: LRUCache[LabelKey, EmbeddedLabelSet] = LRUCache(capacity - capacity // 2)

    def find_missing(self, labels: LabelSet, rule: TextRule) -> list[str]:
        """Return the prompts of a label set that are not cached, each once."""
        return [prompt for prompt in dict.fromkeys(_list_prompts(labels, rule)) if self.prompts.get(prompt) is None]

    async def build(
        self, key: LabelKey, labels: LabelSet, about: ModelAbout, embed: EmbedPrompts, owner: str
    ) -> EmbeddedLabelSet:
        """Make an embedded label set and cache it for `owner`. Only prompts that are not cached are passed to `embed`.

        `embed` caches the prompts' embeddings itself. Raises what `embed` raises.
        """

        async def complete(prompts: Sequence[str]) -> EmbeddedPrompts:
            known: dict[str, tuple[Floats, Reading]] = {}
            for prompt in prompts:
                if (cached := self.prompts.get(prompt)) is not None:
                    known[prompt] = cached.vector, cached.reading
            if unknown := [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]:
                embedded = await embed(unknown)
                known.update(zip(unknown, zip(embedded.vectors, embedded.readings, strict=True), strict=True))
            rows = [known[prompt] for prompt in prompts]
            return EmbeddedPrompts(np.asarray([row[0] for row in rows], np.float32), [row[1] for row in rows])

        label_set = await embed_label_set(labels, about, complete)
        self.label_sets.put(key, label_set, label_set.count_bytes(), owner)
        return label_set


def make_key(names: Sequence[str], templates: Sequence[str]) -> LabelKey:
    """Return the cache's key of a request's label names and templates, which must be valid Unicode."""
    digest = hashlib.blake2b(digest_size=32)
    for texts in (names, templates):
        digest.update(b"%d;" % len(texts))
        for text in texts:
            encoded = text.encode()
            digest.update(b"%d:" % len(encoded) + encoded)
    return digest.digest()


async def embed_label_set(labels: LabelSet, about: ModelAbout, embed: EmbedPrompts) -> EmbeddedLabelSet:
    """Embed a label set's prompts, average them per label, and make the linear head.

    Raises `siglip.labels.LabelError` if the model cannot read a label or cannot tell two apart, and if a linear probe
    of the label set belongs to another model.
    """
    rule = FAMILIES[about.family]
    prompts = _list_prompts(labels, rule)
    embedded = await embed(prompts) if prompts else EmbeddedPrompts(np.zeros((0, about.width), np.float32), [])
    found = LabelReadings(labels, rule, embedded.readings)
    if doubtful := found.list_doubtful():
        found.add_names((await embed(doubtful)).readings)
    found.check()
    texts = average_prompts(embedded.vectors, [len(group) for group in labels.prompts(rule)])
    return EmbeddedLabelSet(
        labels.label_names(),
        labels.digest(rule)[:16],
        build_head(labels, texts, about.scale, about.weights),
        np.asarray(labels.thresholds(), np.float32),
        labels.top_k,
        accept_thresholds(labels) if labels.has_bands() else None,
        sum(reading.tokens > about.text_length for reading in embedded.readings),
        found.describe_partly_read(),
    )


def _list_prompts(labels: LabelSet, rule: TextRule) -> list[str]:
    return [prompt for group in labels.prompts(rule) for prompt in group]
