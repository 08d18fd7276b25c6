"""Default sizes of a run on one machine: actors, readers and decoders."""

from __future__ import annotations

import pytest

from pipelines.config import ActorsConfig
from pipelines.sizing import local_actors, local_readers


def test_actors_of_a_large_model() -> None:
    """One for each two cores, at most 8."""
    assert [local_actors(ActorsConfig(), cores, small=False).smallest for cores in (1, 2, 3, 8, 64)] == [1, 1, 1, 4, 8]


def test_actors_of_a_small_model() -> None:
    """One for each four cores, each with one core."""
    pools = [local_actors(ActorsConfig(), cores, small=True) for cores in (1, 2, 8, 64)]
    assert [(pool.smallest, pool.num_cpus) for pool in pools] == [(1, 1), (1, 1), (2, 1), (8, 1)]


def test_a_configured_pool_is_used_as_it_is() -> None:
    configured = ActorsConfig(max=3)
    assert local_actors(configured, 64, small=True) == configured


@pytest.mark.parametrize(
    ("readers", "rows_per_shard", "expected"),
    [
        (None, 4096, [(1, 1), (1, 2), (2, 2), (8, 2)]),  # two decoders for each reader of large shards
        (None, 200, [(1, 1), (2, 1), (3, 1), (16, 1)]),  # one reader goes on while another is between two shards
        (5, 4096, [(5, 1)] * 4),  # a configured number is used as it is
    ],
)
def test_readers_and_decoders(readers: int | None, rows_per_shard: int, expected: list[tuple[int, int]]) -> None:
    """For 1, 2, 3 and 16 cores."""
    assert [local_readers(readers, rows_per_shard, cores) for cores in (1, 2, 3, 16)] == expected
