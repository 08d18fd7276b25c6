"""Label sets as the endpoint asks them: embedded once, kept, and found again by what was asked."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from siglip.encoder import TEXT_BATCH
from siglip.labels import LabelSet, TextRule
from siglip.scoring import Floats, average_prompts

EmbedTexts = Callable[[Sequence[str]], Awaitable[Floats]]
Key = tuple[tuple[str, ...], tuple[str, ...]]
"""Label names and templates, as they were asked."""


@dataclass(frozen=True)
class Question:
    """A label set with its embeddings: `texts` is float32 (L, D), row i for `names[i]`."""

    labels: LabelSet
    names: list[str]
    digest: str
    texts: Floats
    thresholds: Floats


@dataclass
class _Building:
    task: asyncio.Task[Question]
    waiting: int = 0


@dataclass
class LabelCache:
    """Embeds label sets through `embed`, and keeps up to `capacity` labels' worth, the last used.

    Requests that ask for the same new set at the same time share one embedding of it. It goes on for as long as one of
    them waits, and is dropped with the last. A lookup that hits costs no text forward: two tuples are hashed.
    """

    embed: EmbedTexts
    capacity: int
    _kept: OrderedDict[Key, Question] = field(default_factory=OrderedDict)
    _building: dict[Key, _Building] = field(default_factory=dict)
    _size: int = 0

    def find(self, key: Key) -> Question | None:
        """The set if it is kept, which makes it the last used."""
        question = self._kept.get(key)
        if question is not None:
            self._kept.move_to_end(key)
        return question

    async def build(self, key: Key, labels: LabelSet, rule: TextRule) -> Question:
        """Embed a set that is not kept, and keep it."""
        building = self._building.get(key)
        if building is None:
            task = asyncio.create_task(embed_question(labels, rule, self.embed))
            building = self._building[key] = _Building(task)
            task.add_done_callback(lambda done: self._finish(key, done))
        building.waiting += 1
        try:
            return await asyncio.shield(building.task)
        finally:
            building.waiting -= 1
            if not building.waiting:
                building.task.cancel()

    def _finish(self, key: Key, task: asyncio.Task[Question]) -> None:
        del self._building[key]
        if task.cancelled() or task.exception():
            return
        self._kept[key] = task.result()
        self._size += len(task.result().names)
        while self._size > self.capacity and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._size -= len(oldest.names)


async def embed_question(labels: LabelSet, rule: TextRule, embed: EmbedTexts) -> Question:
    """Embed a label set's prompts.

    They are cut where the encoder would cut them, so that the numbers are the batch job's, and go one piece after
    another, so that images get their turn in between.
    """
    groups = labels.prompts(rule)
    prompts = [prompt for group in groups for prompt in group]
    pieces = [await embed(prompts[start : start + TEXT_BATCH]) for start in range(0, len(prompts), TEXT_BATCH)]
    return Question(
        labels,
        labels.label_names(),
        labels.digest(rule)[:16],
        average_prompts(np.concatenate(pieces), [len(group) for group in groups]),
        np.asarray(labels.thresholds(), np.float32),
    )
