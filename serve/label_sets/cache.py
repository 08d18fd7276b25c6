"""Label sets as the endpoint asks them: embedded once, kept, and found again by what was asked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from serve.model import ModelAbout
from siglip.families import FAMILIES
from siglip.heads import Head, build_head
from siglip.labels import LabelSet, TextRule
from siglip.scoring import Floats, average_prompts

Name = TypeVar("Name")
Value = TypeVar("Value")
EmbedTexts = Callable[[Sequence[str]], Awaitable[Floats]]
Key = tuple[tuple[str, ...], tuple[str, ...]]
"""Label names and templates, as they were asked."""


@dataclass(frozen=True)
class EmbeddedLabelSet:
    """A label set with its head, row i for `names[i]`."""

    labels: LabelSet
    names: list[str]
    digest: str
    head: Head
    thresholds: Floats
    has_bands: bool


class LRUCache(Generic[Name, Value]):
    """Values by name, up to `capacity` of size together, those used last. One that is larger alone is not kept."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[Name, tuple[Value, int]] = OrderedDict()
        self._size = 0

    def find(self, name: Name) -> Value | None:
        """The value if it is kept, which makes it the last used."""
        if name not in self._values:
            return None
        self._values.move_to_end(name)
        return self._values[name][0]

    def keep(self, name: Name, value: Value, size: int = 1) -> None:
        """Keep a value, and forget the ones that were not used for longest."""
        self._size -= self._values.pop(name, (None, 0))[1]
        self._values[name] = value, size
        self._size += size
        while self._size > self._capacity:
            self._size -= self._values.popitem(last=False)[1][1]


class LabelCache:
    """Embeddings of prompts and label sets that were asked.

    A prompt is kept as soon as it is embedded (`keep`), whoever waits for it still: a client that comes again after
    its deadline finds what was done, and sets that overlap share. A set that is found costs two tuples' hash.
    """

    def __init__(self, capacity: int) -> None:
        self.prompts: LRUCache[str, Floats] = LRUCache(capacity)
        self.questions: LRUCache[Key, EmbeddedLabelSet] = LRUCache(capacity)

    def missing(self, labels: LabelSet, rule: TextRule) -> list[str]:
        """The prompts of a set that are to be embedded, each once."""
        return [prompt for prompt in dict.fromkeys(_list_prompts(labels, rule)) if self.prompts.find(prompt) is None]

    async def build(self, key: Key, labels: LabelSet, about: ModelAbout, embed: EmbedTexts) -> EmbeddedLabelSet:
        """A set that is not kept, out of the prompts that are and of `embed` for the others. It is kept then."""

        async def complete(prompts: Sequence[str]) -> Floats:
            known = {prompt: self.prompts.find(prompt) for prompt in prompts}
            unknown = [prompt for prompt, vector in known.items() if vector is None]
            if unknown:
                known.update(zip(unknown, await embed(unknown), strict=True))
            return np.asarray([known[prompt] for prompt in prompts], np.float32)

        question = await embed_label_set(labels, about, complete)
        self.questions.keep(key, question, len(question.names))
        return question


async def embed_label_set(labels: LabelSet, about: ModelAbout, embed: EmbedTexts) -> EmbeddedLabelSet:
    """Embed a label set's prompts. Raises `siglip.labels.LabelError` for a probe of another model."""
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
