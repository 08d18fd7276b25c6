"""What the store cannot give now waits, and is taken up again; what was rejected is taken up when asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from storage.store import join
from tests.jobs import Place, make_image, make_parquet, make_tar
from tests.radosgw import Radosgw


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(str(tmp_path), tmp_path)
    server: Radosgw = request.getfixturevalue("s3_env")
    return Place(f"s3://{server.new_bucket()}", tmp_path)


def tars(count: int, each: int) -> dict[str, bytes]:
    image = make_image()
    return {f"{t:02}.tar": make_tar((f"{t:02}-{n:02}.jpg", image) for n in range(each)) for t in range(count)}


def test_what_is_away_waits_and_comes_back(place: Place) -> None:
    files = tars(12, 20)
    for name, data in files.items():
        place.put(name, data)
    place.plan(rows_per_shard=20)
    away = sorted(files)[::2]
    for name in away:
        place.store.delete(join(place.input, name))
    place.put("01.tar", files["01.tar"] + bytes(10_240))  # still a tar, and another object
    done = place.tag(rows_per_shard=20)
    assert done.returncode == 1, done.stderr
    assert "7 shards or inputs" not in done.stderr
    assert "missing 6: " in done.stderr
    assert "changed 2: " in done.stderr  # the shard that was planned, and the new version that is not
    assert "on_missing: reject" in done.stderr
    assert place.keys_of("data").total() == 5 * 20
    assert place.rows("rejects") == []
    assert place.parts() == []
    manifest = json.loads(place.store.read(join(place.output, "manifest.json")))
    assert (manifest["planned_shards"], manifest["shards"], manifest["rows_in"]) == (12, 5, 100)
    assert {item["reason"] for item in manifest["waiting"]} == {"missing", "changed"}
    assert not place.verify().ok
    # All of it is still away: the run says so again, and does nothing.
    assert place.tag(rows_per_shard=20).returncode == 1
    for name in away:
        place.put(name, files[name])
    # Objects that were uploaded again are the planned ones on S3, by ETag; on a disk their times tell them apart.
    local = not place.root.startswith("s3://")
    done = place.tag(rows_per_shard=20, **({"on_changed": "retag"} if local else {}))
    assert done.returncode == (0 if local else 1), done.stderr
    place.put("01.tar", files["01.tar"])
    done = place.tag(rows_per_shard=20, **({"on_changed": "retag"} if local else {}))
    assert done.returncode == 0, done.stderr
    report = place.verify()
    assert report.ok, report.problems
    images = place.keys_of("data")
    assert set(images) == {f"{t:02}-{n:02}" for t in range(12) for n in range(20)}
    assert max(images.values()) == (2 if local else 1)  # on a disk 01.tar was tagged at two versions


def test_rejects_are_retried_and_nothing_else(place: Place) -> None:
    image, other = make_image(1), make_image(2)
    place.put("a.tar", make_tar([("a0.jpg", image), ("a1.jpg", b"no image"), ("a2.jpg", image)]))
    place.put("b.tar", make_tar([(f"b{n}.jpg", image) for n in range(5)]))
    place.put("broken.jpg", b"no image")
    place.put("list.txt", b"links/0.jpg\nlinks/1.jpg\nhttp://host/x.jpg\n")
    place.put("c.parquet", make_parquet({"url": ["links/1.jpg", "links/0.jpg", None], "n": [1, 2, 3]}))
    place.put("links/0.jpg", other)
    settings = {
        "input": [join(place.input, name) for name in ("a.tar", "b.tar", "broken.jpg", "list.txt", "c.parquet")],
        "rows_per_shard": 3,
        "parquet": {"columns": {"n": "row_number"}},
        "on_missing": "reject",
    }
    place.plan(**settings)
    tar = place.store.read(join(place.input, "b.tar"))
    stamp = Path(place.input, "b.tar").stat() if "://" not in place.root else None
    place.store.delete(join(place.input, "b.tar"))
    done = place.tag(**settings)
    assert done.returncode == 0, done.stderr
    assert place.verify().ok
    before = {(row["source"], row["key"]): row["reason"] for row in place.rows("rejects")}
    assert sorted(before.values()) == ["missing"] * 4 + ["not_an_image"] * 2 + ["unreadable"]
    tagged = place.keys_of("data")
    # What was not there comes: an object of the list, and a whole tar.
    place.put("links/1.jpg", other)
    place.put("b.tar", tar)
    if stamp:
        import os

        os.utime(Path(place.input, "b.tar"), ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert place.tag(**settings).returncode == 0
    assert place.keys_of("data") == tagged  # nobody asked
    done = place.tag("--retry-rejects", "missing", **settings)
    assert done.returncode == 0, done.stderr
    report = place.verify()
    assert report.ok, report.problems
    assert (report.rows_in, report.rows_rejected, report.orphans) == (3 + 5 + 1 + 3 + 3, 4, 0)
    assert place.keys_of("data") - tagged == {"b0": 1, "b1": 1, "b2": 1, "b3": 1, "b4": 1, "links/1.jpg": 1, "0": 1}
    assert {row["key"]: row["row_number"] for row in place.rows("data") if row["source"].endswith("c.parquet")} == {
        "0": 1,
        "1": 2,
    }
    reasons = sorted(row["reason"] for row in place.rows("rejects"))
    assert reasons == ["missing", "not_an_image", "not_an_image", "unreadable"]
    # All reasons; an image that is mended is another object, so only the rows that can be read again are.
    assert place.tag("--retry-rejects", **settings).returncode == 0
    assert place.verify().ok
    assert sorted(row["reason"] for row in place.rows("rejects")) == reasons
    assert "no such reason" in place.tag("--retry-rejects", "because", **settings).stderr


def test_one_object_that_can_never_be_read_blocks_its_shard_alone(place: Place) -> None:
    for name, data in tars(3, 4).items():
        place.put(name, data)
    for number in range(6):
        place.put(f"loose/{number}.jpg", make_image(number))
    place.plan(rows_per_shard=3)
    place.store.delete(join(place.input, "loose/4.jpg"))
    for _ in range(2):
        done = place.tag(rows_per_shard=3)
        assert done.returncode == 1, done.stderr
        assert "missing 1: " in done.stderr
        assert "loose/4.jpg" in done.stderr
        assert place.keys_of("data").total() == 12 + 3
    # New inputs are not held up by it.
    place.put("new.tar", make_tar([("new.jpg", make_image())]))
    done = place.tag(rows_per_shard=3)
    assert done.returncode == 1, done.stderr
    assert place.keys_of("data")["new"] == 1
