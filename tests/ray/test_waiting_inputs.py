"""Inputs that the store cannot deliver wait for a later run. Rejected rows are retried with `--retry-rejects`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines import committer
from pipelines.cluster import COMMIT_CPUS, RETRIES
from pipelines.committer import Parts
from pipelines.output.commit import commit_shard
from pipelines.output.writer import OutputWriter
from pipelines.planning.plan import ShardRef
from pipelines.ray_internals import count_retries
from pipelines.stages.parts import ShardSummary
from storage.store import join
from tests.support.jobs import Place, make_image, make_parquet
from tests.support.stores.radosgw import Radosgw
from tests.support.tars import make_tar

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return Place(str(tmp_path), tmp_path)


@pytest.fixture
def remote(s3_env: Radosgw, tmp_path: Path) -> Place:
    return Place(f"s3://{s3_env.new_bucket()}", tmp_path)


def tars(count: int, each: int) -> dict[str, bytes]:
    image = make_image()
    return {f"{t:02}.tar": make_tar((f"{t:02}-{n:02}.jpg", image) for n in range(each)) for t in range(count)}


@pytest.mark.parametrize("where", ["local", pytest.param("remote", marks=pytest.mark.s3)])
def test_missing_and_changed_inputs_wait_until_they_are_back(where: str, request: pytest.FixtureRequest) -> None:
    place: Place = request.getfixturevalue(where)
    files = tars(12, 20)
    for name, data in files.items():
        place.put(name, data)
    place.plan(rows_per_shard=20)
    away = sorted(files)[::2]
    for name in away:
        place.store.delete(join(place.input, name))
    place.put("01.tar", files["01.tar"] + bytes(10_240))  # still a valid tar, but another object
    done = place.tag(rows_per_shard=20)
    assert done.returncode == 1, done.stderr
    assert "waiting: 7 shards, with about 140 images;" in done.stderr
    assert "missing 6: " in done.stderr
    assert "changed 1: " in done.stderr  # the planned shard, and not once more the new version of its tar
    assert "on_missing: reject" in done.stderr
    assert "on_changed: retag" in done.stderr
    assert place.keys_of("data").total() == 5 * 20
    assert place.rows("rejects") == []
    assert place.parts() == []
    manifest = json.loads(place.store.read(join(place.output, "manifest.json")))
    assert (manifest["planned_shards"], manifest["shards"], manifest["rows_in"]) == (12, 5, 100)
    assert {item["reason"] for item in manifest["waiting"]} == {"missing", "changed"}
    assert not place.verify().ok
    # Everything is still missing: the run reports that again, and does nothing.
    assert place.tag(rows_per_shard=20).returncode == 1
    for name in away:
        place.put(name, files[name])
    # A file that is uploaded again has the planned ETag on S3. On a disk its modification time makes it another input.
    done = place.tag(rows_per_shard=20, **({"on_changed": "retag"} if where == "local" else {}))
    assert done.returncode == (0 if where == "local" else 1), done.stderr
    place.put("01.tar", files["01.tar"])
    done = place.tag(rows_per_shard=20, **({"on_changed": "retag"} if where == "local" else {}))
    assert done.returncode == 0, done.stderr
    report = place.verify()
    assert report.ok, report.problems
    images = place.keys_of("data")
    assert set(images) == {f"{t:02}-{n:02}" for t in range(12) for n in range(20)}
    assert max(images.values()) == (2 if where == "local" else 1)  # on a disk both versions of 01.tar were tagged


@pytest.mark.s3
def test_only_rejected_rows_with_the_given_reasons_are_retried(remote: Place) -> None:
    image, other = make_image(1), make_image(2)
    remote.put("a.tar", make_tar([("a0.jpg", image), ("a1.jpg", b"no image"), ("a2.jpg", image)]))
    remote.put("b.tar", make_tar([(f"b{n}.jpg", image) for n in range(5)]))
    remote.put("broken.jpg", b"no image")
    remote.put("list.txt", b"links/0.jpg\nlinks/1.jpg\nftp://host/x.jpg\n")
    remote.put("c.parquet", make_parquet({"url": ["links/1.jpg", "links/0.jpg", None], "n": [1, 2, 3]}))
    remote.put("links/0.jpg", other)
    settings = {
        "input": [join(remote.input, name) for name in ("a.tar", "b.tar", "broken.jpg", "list.txt", "c.parquet")],
        "rows_per_shard": 3,
        "parquet": {"columns": {"n": "row_number"}},
        "on_missing": "reject",
    }
    remote.plan(**settings)
    tar = remote.store.read(join(remote.input, "b.tar"))
    remote.store.delete(join(remote.input, "b.tar"))
    done = remote.tag(**settings)
    assert done.returncode == 0, done.stderr
    assert remote.verify().ok
    before = {(row["source"], row["key"]): row["reason"] for row in remote.rows("rejects")}
    assert sorted(before.values()) == ["missing"] * 4 + ["not_an_image"] * 2 + ["unreadable"]
    tagged = remote.keys_of("data")
    # The missing inputs arrive: an object of the list, and a whole tar.
    remote.put("links/1.jpg", other)
    remote.put("b.tar", tar)
    assert remote.tag(**settings).returncode == 0
    assert remote.keys_of("data") == tagged  # without --retry-rejects nothing is retried
    done = remote.tag("--retry-rejects", "missing", **settings)
    assert done.returncode == 0, done.stderr
    report = remote.verify()
    assert report.ok, report.problems
    assert (report.rows_in, report.rows_rejected, report.orphans) == (3 + 5 + 1 + 3 + 3, 4, 0)
    assert remote.keys_of("data") - tagged == {"b0": 1, "b1": 1, "b2": 1, "b3": 1, "b4": 1, "links/1.jpg": 1, "0": 1}
    assert {row["key"]: row["row_number"] for row in remote.rows("data") if row["source"].endswith("c.parquet")} == {
        "0": 1,
        "1": 2,
    }
    reasons = sorted(row["reason"] for row in remote.rows("rejects"))
    assert reasons == ["missing", "not_an_image", "not_an_image", "unreadable"]
    # Retry all reasons. A repaired image is another object, so only rows of unchanged inputs are retried.
    assert remote.tag("--retry-rejects", **settings).returncode == 0
    assert remote.verify().ok
    assert sorted(row["reason"] for row in remote.rows("rejects")) == reasons
    assert "no such reason" in remote.tag("--retry-rejects", "because", **settings).stderr


def test_a_missing_object_blocks_only_its_own_shard(local: Place) -> None:
    for name, data in tars(3, 4).items():
        local.put(name, data)
    for number in range(6):
        local.put(f"loose/{number}.jpg", make_image(number))
    local.plan(rows_per_shard=3)
    local.store.delete(join(local.input, "loose/4.jpg"))
    for _ in range(2):
        done = local.tag(rows_per_shard=3)
        assert done.returncode == 1, done.stderr
        assert "missing 1: " in done.stderr
        assert "loose/4.jpg" in done.stderr
        assert local.keys_of("data").total() == 12 + 3
    # New inputs are tagged all the same.
    local.put("new.tar", make_tar([("new.jpg", make_image())]))
    done = local.tag(rows_per_shard=3)
    assert done.returncode == 1, done.stderr
    assert local.keys_of("data")["new"] == 1


def test_a_task_whose_process_dies_knows_its_last_attempt() -> None:
    @ray.remote(max_retries=RETRIES, num_cpus=0)  # type: ignore[untyped-decorator]
    def die_until_the_last_attempt() -> int:
        if count_retries() < RETRIES:
            os._exit(1)
        return count_retries()

    assert count_retries() == 0
    assert ray.get(die_until_the_last_attempt.remote()) == RETRIES


def test_a_shard_that_cannot_be_committed_waits(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's code is patched by value: a fault in committing one shard leaves the others committed."""
    for name, data in tars(2, 3).items():
        local.put(name, data)

    def commit_or_fail(
        writer: OutputWriter, shards: list[tuple[ShardRef, Parts, ShardSummary]]
    ) -> list[dict[str, Any] | str]:
        return [
            "KeyError: 'key'" if ref.shard.endswith("000000") else commit_shard(writer, ref, parts, summary)
            for ref, parts, summary in shards
        ]

    monkeypatch.setattr(committer, "_commit", ray.remote(num_cpus=COMMIT_CPUS)(commit_or_fail))
    done = local.tag(rows_per_shard=3)
    assert done.returncode == 1, done.stderr
    assert "error 1: shard 000000-000000: KeyError" in done.stderr
    assert local.keys_of("data").total() == 3
    assert local.parts() == []
    monkeypatch.undo()
    assert local.tag(rows_per_shard=3).returncode == 0
    assert local.verify().ok


def test_a_reject_of_an_image_that_has_changed_does_not_make_each_retry_fail(local: Place) -> None:
    for number in range(3):
        local.put(f"{number}.jpg", make_image(number))
    local.put("bad.jpg", b"no image")
    local.plan()
    local.put("0.jpg", make_image(10))
    done = local.tag(on_changed="retag")
    assert done.returncode == 0, done.stderr
    assert sorted(row["reason"] for row in local.rows("rejects")) == ["changed", "not_an_image"]
    local.put("bad.jpg", make_image(11))
    for _ in range(2):
        done = local.tag("--retry-rejects", on_changed="retag")
        assert done.returncode == 0, done.stderr
        assert "2 rejected rows whose input has changed since it was planned (they stay rejected)" in done.stdout
    # Without `retag`, a new version that is not planned waits, once.
    local.put("1.jpg", make_image(12))
    done = local.tag("--retry-rejects")
    assert done.returncode == 1
    assert "waiting: 1 input, with about 1 images;" in done.stderr
    assert "changed 1: " in done.stderr
    assert sorted(row["reason"] for row in local.rows("rejects")) == ["changed", "not_an_image"]
    assert local.keys_of("data") == {"0.jpg": 1, "1.jpg": 1, "2.jpg": 1, "bad.jpg": 1}
    assert local.verify().ok
