"""An LRU cache whose capacity counts sizes of values, not only their number."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class LRUCache(Generic[Key, Value]):
    """Values by key, whose sizes add up to at most `capacity`. The least recently used values are dropped first.

    A value that is larger than `capacity` is not cached, and its insertion drops all others. It is not thread-safe.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._size = 0

    def get(self, key: Key) -> Value | None:
        """Return the cached value, or None. The value becomes the most recently used."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Key, value: Value, size: int = 1) -> None:
        """Cache a value of `size`, and drop the least recently used values beyond the capacity."""
        self._size -= self._values.pop(key, (None, 0))[1]
        self._values[key] = value, size
        self._size += size
        while self._size > self._capacity:
            self._size -= self._values.popitem(last=False)[1][1]
