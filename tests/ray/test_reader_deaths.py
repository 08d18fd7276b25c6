"""A shard that ends the process that reads it waits, whatever it has delivered by then. All others are committed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import cluster, job
from pipelines.ray_internals import count_retries
from pipelines.stages.reader import ReaderConfig, read_shard
from tests.support.jobs import Place, make_image
from tests.support.tars import make_tar

pytestmark = pytest.mark.usefixtures("local_ray")
KILLER = "17"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(tmp_path), tmp_path)


def check(place: Place, done: int, waiting: int) -> None:
    """Check the first run, which left one shard of `waiting` images, and a second one that nothing ends."""
    assert place.keys_of("data").total() == done
    assert place.parts() == []
    second = place.tag()
    assert second.returncode == 0, second.stderr
    assert set(place.keys_of("data").values()) == {1}
    assert place.keys_of("data").total() == done + waiting
    report = place.verify()
    assert report.ok, report.problems


def test_small_shards_share_a_block_until_it_ends_its_process(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_image()
    for number in range(120):
        place.put(f"{number:02}.tar", make_tar([(f"{number:02}.jpg", image)]))
    place.keys = {"rows_per_shard": 1}

    def read_and_die(block: pa.Table, config: ReaderConfig) -> Iterator[pa.Table]:
        for table in read_shard(block, config):
            if any(key == KILLER for key in table["key"].to_pylist()):
                os._exit(1)
            yield table

    blocks: list[list[int]] = []
    build = job.build_dataset

    def build_and_note(pending, *rest):  # type: ignore[no-untyped-def]
        blocks.append([len(group) for group in pending])
        return build(pending, *rest)

    monkeypatch.setattr(job, "read_shard", read_and_die)
    monkeypatch.setattr(job, "build_dataset", build_and_note)
    done = place.tag()
    monkeypatch.undo()
    assert done.returncode == 1
    assert "error 1: the process that read this shard died at 5 attempts" in done.stderr
    assert "17.tar" in done.stderr
    assert len(blocks) == 2
    first, again = blocks
    assert sum(first) == 120
    assert max(first) > 1
    assert again == [1] * max(first)
    check(place, 119, 1)


def test_a_shard_that_has_delivered_blocks_waits_too(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray keeps what an attempt has returned, so the summary of the last attempt may be lost."""
    image = make_image()
    for tar in range(3):
        place.put(f"{tar}.tar", make_tar((f"{tar}-{n:03}.jpg", image) for n in range(300)))
    place.keys = {"rows_per_shard": 300}

    def read_and_die(block: pa.Table, config: ReaderConfig) -> Iterator[pa.Table]:
        kills = block["refs"][0][0]["shard"].as_py().endswith("1")
        tables = (table.slice(k, 50) for table in read_shard(block, config) for k in range(0, len(table), 50))
        for number, table in enumerate(tables):
            yield table
            if kills and number == 2 and count_retries() < cluster.RETRIES:
                os._exit(1)

    monkeypatch.setattr(job, "read_shard", read_and_die)
    monkeypatch.setattr(cluster, "BLOCK_BYTES", 1000)  # so that each slice is a block
    done = place.tag()
    monkeypatch.undo()
    assert done.returncode == 1
    assert "error 1: the process that read this shard died at 5 attempts" in done.stderr
    assert "1.tar" in done.stderr
    check(place, 600, 300)
