"""The LRU cache of the endpoint: bytes, order, replacement and owners."""

from __future__ import annotations

import random

from serve.label_sets.lru_cache import LRUCache


def test_the_least_recently_used_value_is_dropped_first() -> None:
    cache: LRUCache[str, int] = LRUCache(2)
    cache.put("a", 1, size=1)
    cache.put("b", 2, size=1)
    assert cache.get("a") == 1
    cache.put("c", 3, size=1)
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


def test_a_value_larger_than_the_capacity_is_not_cached_and_drops_no_other() -> None:
    cache: LRUCache[str, int] = LRUCache(10)
    cache.put("b", 2, size=3)
    cache.put("a", 1, size=11)
    assert [cache.get(key) for key in "ab"] == [None, 2]


def test_an_owner_that_fills_the_cache_drops_only_its_own_values() -> None:
    cache: LRUCache[str, int] = LRUCache(100)
    for number in range(4):
        cache.put(f"modest {number}", number, size=10, owner="modest")
    for number in range(1000):
        cache.put(f"greedy {number}", number, size=10, owner="greedy")
    assert [cache.get(f"modest {number}") for number in range(4)] == [0, 1, 2, 3]
    assert cache.get("greedy 999") == 999
    assert cache.size <= 100


def test_a_value_keeps_its_first_owner() -> None:
    cache: LRUCache[str, int] = LRUCache(30)
    cache.put("shared", 1, size=10, owner="first")
    cache.put("shared", 2, size=10, owner="second")
    cache.put("own", 3, size=20, owner="second")
    cache.put("more", 4, size=10, owner="second")
    assert [cache.get(key) for key in ("shared", "own", "more")] == [2, None, 4]


def test_the_size_is_always_that_of_the_values() -> None:
    rng, cache = random.Random(0), LRUCache[int, int](500)
    for _ in range(5000):
        cache.put(rng.randrange(60), 0, rng.randrange(1, 120), owner=rng.choice("abc"))
        assert cache.size == sum(size for _, size, _ in cache._values.values()) == sum(cache._sizes.values()) <= 500
        assert sorted(key for order in cache._orders.values() for key in order) == sorted(cache._values)
