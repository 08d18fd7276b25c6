"""The LRU cache of the endpoint: sizes, order and replacement."""

from __future__ import annotations

from serve.lru_cache import LRUCache


def test_the_least_recently_used_value_is_dropped_first() -> None:
    cache: LRUCache[str, int] = LRUCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert [cache.get(key) for key in "abc"] == [1, None, 3]


def test_sizes_count_against_the_capacity() -> None:
    cache: LRUCache[str, int] = LRUCache(10)
    cache.put("a", 1, size=4)
    cache.put("b", 2, size=4)
    cache.put("c", 3, size=6)
    assert [cache.get(key) for key in "abc"] == [None, 2, 3]


def test_a_replaced_value_frees_its_size() -> None:
    cache: LRUCache[str, int] = LRUCache(10)
    cache.put("a", 1, size=9)
    cache.put("a", 2, size=1)
    cache.put("b", 3, size=9)
    assert [cache.get(key) for key in "ab"] == [2, 3]


def test_a_value_larger_than_the_capacity_is_not_cached() -> None:
    cache: LRUCache[str, int] = LRUCache(10)
    cache.put("a", 1, size=11)
    assert cache.get("a") is None
