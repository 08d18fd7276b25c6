"""An LRU cache that is bounded in bytes and shared fairly among owners."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class LRUCache(Generic[Key, Value]):
    """Values by key, whose sizes in bytes add up to at most `capacity`. It is not thread-safe.

    A value belongs to the owner that put it there first, and every owner can read it. Beyond the capacity, the owner
    with the most bytes loses its least recently used values. An owner that fills the cache therefore drops only its own
    values as soon as it has more than the others. A value that is larger than `capacity` is not cached.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: dict[Key, tuple[Value, int, str]] = {}
        self._orders: dict[str, OrderedDict[Key, None]] = {}  # by owner: its keys, least recently used first
        self._sizes: dict[str, int] = {}
        self.size = 0
        """The bytes of all values."""

    def get(self, key: Key) -> Value | None:
        """Return the cached value, or None. The value becomes its owner's most recently used."""
        found = self._values.get(key)
        if found is None:
            return None
        self._orders[found[2]].move_to_end(key)
        return found[0]

    def put(self, key: Key, value: Value, size: int, owner: str = "") -> None:
        """Cache a value of `size` bytes, and drop values beyond the capacity."""
        if key in self._values:
            owner = self._values[key][2]
            self._remove(key)
        if size > self._capacity:
            return
        self._values[key] = value, size, owner
        self._orders.setdefault(owner, OrderedDict())[key] = None
        self._sizes[owner] = self._sizes.get(owner, 0) + size
        self.size += size
        while self.size > self._capacity:
            largest = max(self._sizes, key=self._sizes.__getitem__)
            self._remove(next(iter(self._orders[largest])))

    def _remove(self, key: Key) -> None:
        _, size, owner = self._values.pop(key)
        del self._orders[owner][key]
        self._sizes[owner] -= size
        self.size -= size
        if not self._orders[owner]:
            del self._orders[owner], self._sizes[owner]
