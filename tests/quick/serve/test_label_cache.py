"""The cache of label sets that requests bring along: its memory, its keys, and prompts that were cut."""

from __future__ import annotations

import asyncio
import hashlib
import random
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from serve.label_sets.cache import EmbeddedLabelSet, LabelCache, make_key
from serve.label_sets.prompts import EmbeddedPrompts
from serve.model import ModelAbout
from siglip.config import ImageSpec
from siglip.label_text.tokens import Reading
from siglip.labels import LabelSet
from siglip.scoring import Scale

WIDTH = 768
ABOUT = ModelAbout(
    config="",
    spec=ImageSpec(size=64),
    width=WIDTH,
    scale=Scale(100.0, -10.0),
    text_length=16,
    batch_size=8,
    text_batch=64,
    device="cpu",
    dtype="float32",
    min_cosine=None,
    weights="0" * 64,
    family="siglip",
    loaded=0,
)


def make_digest(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode(), digest_size=16).digest()


def build(cache: LabelCache, names: Sequence[str], templates: Sequence[str], owner: str = "") -> EmbeddedLabelSet:
    """Embed a label set as the endpoint does: prompts of a batch are rows of one array, and are cached."""
    labels = LabelSet(names=tuple(names), templates=tuple(templates), threshold=0.0, top_k=None)

    async def embed(prompts: Sequence[str]) -> EmbeddedPrompts:
        vectors = np.full((len(prompts), WIDTH), WIDTH**-0.5, np.float32)
        readings = [Reading(len(prompt.split()), len(prompt), 0, make_digest(prompt)) for prompt in prompts]
        for prompt, vector, reading in zip(prompts, vectors, readings, strict=True):
            cache.prompts.put(prompt, vector, reading, owner)
        return EmbeddedPrompts(vectors, readings)

    return asyncio.run(cache.build(make_key(names, templates), labels, ABOUT, embed, owner))


@pytest.mark.parametrize(("labels", "templates"), [(1, 1000), (1000, 1), (30, 30), (1, 1)])
def test_the_memory_of_the_cache_is_bounded_however_labels_and_templates_are_chosen(
    labels: int, templates: int
) -> None:
    """A request with one label and a thousand shuffled templates brings a thousand new prompts in 12 KB."""
    capacity, rng = 4 * 2**20, random.Random(0)
    cache = LabelCache(capacity)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        prompts = 0
        while prompts < 8_000:
            words = [rng.randbytes(8).hex() for _ in range(20)]
            names = [f"{words[0]} {n}" for n in range(labels)]
            build(cache, names, [f"{' '.join(rng.sample(words, 12))} {{label}} {n}" for n in range(templates)])
            prompts += max(50, labels * templates)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert used < 1.1 * capacity
    counted = cache.prompts.size + cache.label_sets.size
    assert 0.8 * counted < used < 1.1 * counted, "the sizes are those of the memory that is kept"


def test_a_key_that_fills_the_cache_keeps_the_label_sets_of_others() -> None:
    cache = LabelCache(2 * 2**20)
    names, templates = ["cat", "dog"], ["a photo of a {label}"]
    build(cache, names, templates, "modest")
    for number in range(200):
        build(cache, [f"{number} {n}" for n in range(20)], templates, "greedy")
    assert cache.label_sets.get(make_key(names, templates)) is not None
    assert cache.prompts.get("a photo of a cat") is not None


def test_keys_tell_label_sets_apart() -> None:
    sets = [(["ab", "c"], ["x"]), (["a", "bc"], ["x"]), (["ab"], ["c", "x"]), (["ab", "c", "x"], []), (["ab,c"], ["x"]),
            (["c", "ab"], ["x"]), (["ab", "c1:x"], []), (["ab", "c"], ["x", ""])]  # fmt: skip
    assert len({make_key(names, templates) for names, templates in sets}) == len(sets)
    assert make_key(["a"], ["x"]) == make_key(("a",), ("x",))


def test_a_label_set_counts_prompts_that_the_model_does_not_read_to_the_end() -> None:
    cache = LabelCache(2**20)
    long = " ".join(["word"] * 20)
    assert build(cache, ["cat", long], ["a {label}"]).truncated == 1
    assert build(cache, [long, "other"], ["a {label}"]).truncated == 1, "also if its embedding is cached"
    assert build(cache, ["cat"], ["a {label}"]).truncated == 0
