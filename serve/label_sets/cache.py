"""Embedded label sets: how one is made of a label set's prompts, and the cache of those that requests bring along."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from serve.lru_cache import LRUCache
from serve.model import ModelAbout
from siglip.families import FAMILIES
from siglip.heads import LinearHead, build_head
from siglip.labels import LabelSet, TextRule
from siglip.scoring import Floats, average_prompts

EmbedTexts = Callable[[Sequence[str]], Awaitable[Floats]]
"""Texts to their embeddings, float32 (N, D) of unit norm."""
LabelKey = tuple[tuple[str, ...], tuple[str, ...]]
"""Label names and templates of a request, as the client wrote them."""


@dataclass(frozen=True)
class EmbeddedLabelSet:
    """A label set with its linear head. Row i of the head and of `thresholds` belongs to `names[i]`.

    `digest` has the first 16 hexadecimal digits of `LabelSet.digest`.
    """

    labels: LabelSet
    names: list[str]
    digest: str
    head: LinearHead
    thresholds: Floats
    has_bands: bool


class LabelCache:
    """LRU caches of prompts' embeddings and of the embedded label sets that requests bring along.

    `prompts` maps a prompt to its embedding, float32 (D,). `label_sets` maps a request's label names and templates to
    the embedded label set. Each has room for `capacity` prompts or labels.

    A prompt is cached as soon as it is embedded, even if the request has ended by then. A client that repeats a request
    after its deadline therefore finds the prompts that were embedded so far, and label sets that overlap share prompts.
    Finding a cached label set costs the hash of two tuples.
    """

    def __init__(self, capacity: int) -> None:
        self.prompts: LRUCache[str, Floats] = LRUCache(capacity)
        self.label_sets: LRUCache[LabelKey, EmbeddedLabelSet] = LRUCache(capacity)

    def find_missing(self, labels: LabelSet, rule: TextRule) -> list[str]:
        """Return the prompts of a label set that are not cached, each once."""
        return [prompt for prompt in dict.fromkeys(_list_prompts(labels, rule)) if self.prompts.get(prompt) is None]

    async def build(self, key: LabelKey, labels: LabelSet, about: ModelAbout, embed: EmbedTexts) -> EmbeddedLabelSet:
        """Make an embedded label set and cache it. Only prompts that are not cached are passed to `embed`.

        `embed` caches the prompts' embeddings itself. Raises what `embed` raises.
        """

        async def complete(prompts: Sequence[str]) -> Floats:
            known = {prompt: self.prompts.get(prompt) for prompt in prompts}
            unknown = [prompt for prompt, vector in known.items() if vector is None]
            if unknown:
                known.update(zip(unknown, await embed(unknown), strict=True))
            return np.asarray([known[prompt] for prompt in prompts], np.float32)

        label_set = await embed_label_set(labels, about, complete)
        self.label_sets.put(key, label_set, len(label_set.names))
        return label_set


async def embed_label_set(labels: LabelSet, about: ModelAbout, embed: EmbedTexts) -> EmbeddedLabelSet:
    """Embed a label set's prompts, average them per label, and make the linear head.

    Raises `siglip.labels.LabelError` if a linear probe of the label set belongs to another model.
    """
    rule = FAMILIES[about.family]
    prompts = _list_prompts(labels, rule)
    vectors = await embed(prompts) if prompts else np.zeros((0, about.width), np.float32)
    texts = average_prompts(vectors, [len(group) for group in labels.prompts(rule)])
    return EmbeddedLabelSet(
        labels,
        labels.label_names(),
        labels.digest(rule)[:16],
        build_head(labels, texts, about.scale, about.weights),
        np.asarray(labels.thresholds(), np.float32),
        labels.has_bands(),
    )


def _list_prompts(labels: LabelSet, rule: TextRule) -> list[str]:
    return [prompt for group in labels.prompts(rule) for prompt in group]
