"""Embeddings of prompts, and their cache."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from serve.label_sets.lru_cache import LRUCache
from siglip.label_text.tokens import Reading
from siglip.scoring import Floats

ENTRY_BYTES = 750
"""Bytes of a cached value's entries in dictionaries, and of the Python objects around an array."""


@dataclass(frozen=True)
class EmbeddedPrompts:
    """Embeddings of prompts, float32 (N, D), and what the model read of each."""

    vectors: Floats
    readings: list[Reading]


@dataclass(frozen=True)
class CachedPrompt:
    """A prompt's embedding, float32 (D,), and what the model read of the prompt."""

    vector: Floats
    reading: Reading


class PromptCache:
    """An LRU cache of prompts' embeddings, of at most `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self._cache: LRUCache[str, CachedPrompt] = LRUCache(capacity)

    def get(self, prompt: str) -> CachedPrompt | None:
        """Return a prompt's embedding, or None if it is not cached."""
        return self._cache.get(prompt)

    def put(self, prompt: str, vector: Floats, reading: Reading, owner: str) -> None:
        """Cache a prompt's embedding for `owner`. A row of a larger array is copied: it would keep the whole array."""
        own = vector if vector.base is None else vector.copy()
        size = sys.getsizeof(prompt) + own.nbytes + ENTRY_BYTES
        self._cache.put(prompt, CachedPrompt(own, reading), size, owner)

    @property
    def size(self) -> int:
        """The bytes of all cached prompts and their embeddings."""
        return self._cache.size
