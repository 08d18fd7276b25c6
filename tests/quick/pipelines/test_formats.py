"""Planning and reading: every kind of input, awkward names, broken archives. No Ray, no model."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.inputs import tar
from pipelines.inputs.rows import Input
from pipelines.output.output import Output
from pipelines.planning.plan import list_shards
from storage.settings import ConfigError
from storage.store import Changed, NotFound, Store
from tests.support.images import encode, make_rgb
from tests.support.input_folder import OPTIONS, Folder, outcomes
from tests.support.tars import make_tar


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


JPEG = encode(make_rgb(), "JPEG")


MEMBERS = [(f"{n:04d}.jpg", encode(make_rgb(300, 300, n), "JPEG")) for n in range(4)]
WHOLE = make_tar(MEMBERS)
BOUNDARY = 3 * 512 + sum(-(-len(data) // 512) * 512 for _, data in MEMBERS[:3])


def test_images_over_the_cap_are_not_read(folder: Folder) -> None:
    folder.write("a.tar", make_tar([("small.jpg", JPEG), ("big.jpg", bytes(50_000)), ("after.jpg", JPEG)]))
    folder.write("big.jpg", bytes(50_000))
    rows = folder.rows(limits={"max_bytes": 40_000})
    assert outcomes(rows) == [
        ("small", None),
        ("big", "too_many_bytes"),
        ("after", None),
        ("big.jpg", "too_many_bytes"),
    ]


def test_a_mixed_prefix_is_sorted_out(folder: Folder) -> None:
    names = ["a/b/c/deep.JPG", "with space.png", "hash#1%20.webp", "ünïcode – 東京.jpeg", "x.TIFF"]
    for name in names:
        folder.write(name, JPEG)
    for name in ("readme.md", "notes.txt", "list.csv", ".DS_Store", "._a.jpg", "noextension", "movie.mp4"):
        folder.write(name, b"x")
    buffer = io.BytesIO()
    pq.write_table(pa.table({"n": [1]}), buffer)
    folder.write("numbers.parquet", buffer.getvalue())
    report = folder.plan()
    assert report.inputs == len(names)
    assert report.skipped.counts.total() == 8
    assert report.skipped.counts["Parquet files without an image column"] == 1
    assert report.skipped.counts["hidden files"] == 2
    assert report.skipped.examples["hidden files"] == [str(folder.input / name) for name in (".DS_Store", "._a.jpg")]
    assert {row.key for row in folder.rows()} == set(names)


def test_shards_hold_about_as_many_rows_as_asked(folder: Folder) -> None:
    for number in range(25):
        folder.write(f"loose/{number:03d}.jpg", JPEG)
    for number in range(3):
        folder.write(f"tars/{number}.tar", make_tar([(f"{n:03d}.jpg", JPEG) for n in range(10)]))
    report = folder.plan(rows_per_shard=10)
    assert report.rows == pytest.approx(55, rel=0.1)
    assert 5 <= report.shards <= 7


def test_a_few_tars_of_a_folder_tell_how_large_the_others_are(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def look(store: Store, planned: Input) -> int:
        looked.append(planned.uri.rpartition("/")[2])
        return estimate(store, planned)

    estimate = tar._estimate_rows
    monkeypatch.setattr(tar, "_estimate_rows", look)
    large = make_rgb(600, 400)
    for number in range(200):
        count = 3 + number % 7
        folder.write(f"small/{number:03d}.tar", make_tar([(f"{n}.jpg", JPEG) for n in range(count)]))
    for number in range(5):
        members = [(f"{n}.jpg", encode(large, "JPEG")) for n in range(8)]
        folder.write(f"large/{number}.tar", make_tar(members))
        folder.write(f"small/{number}.tar.gz", make_tar(members, "w:gz"))
    folder.write("small/150.tar", b"no tar at all")
    report = folder.plan(rows_per_shard=10)
    assert report.inputs == 210
    assert len(looked) < 70
    assert [name for name in looked if name.endswith("gz")] == [f"{n}.tar.gz" for n in range(5)]
    real = sum(3 + number % 7 for number in range(200)) + 80
    assert report.rows == pytest.approx(real, rel=0.25)
    assert len(folder.rows()) == real - (3 + 150 % 7) + 1


def test_new_inputs_are_appended_and_changed_ones_refused(folder: Folder) -> None:
    first = folder.write("a.jpg", JPEG)
    assert folder.plan().inputs == 1
    folder.write("b.jpg", JPEG)
    report = folder.plan()
    assert (report.inputs, report.known, report.shards) == (1, 1, 1)
    assert folder.plan(input=[str(folder.input), str(first)]).inputs == 0  # listed twice, planned once
    first.write_bytes(JPEG + b"more")
    report = folder.plan()
    assert report.inputs == 0
    assert [(item.name, item.reason) for item in report.waiting] == [(str(first), "changed")]
    assert folder.plan(on_changed="retag").inputs == 1
    with pytest.raises(Changed):  # the old version is planned and gone
        folder.rows(on_changed="error", input=str(folder.input / "b.jpg"))
    rows = folder.rows(on_changed="retag")
    assert outcomes(rows) == [("a.jpg", "changed"), ("b.jpg", None), ("a.jpg", None)]
    assert rows[2].data == JPEG + b"more"


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.jpg"])
def test_planned_objects_that_change_or_vanish_are_trouble_of_the_store(folder: Folder, name: str) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [JPEG] * 30}), buffer)
    contents = {"a.tar": make_tar([(f"{n}.jpg", JPEG) for n in range(30)]), "a.parquet": buffer.getvalue()}
    content = contents.get(name, JPEG)
    path = folder.write(name, content)
    folder.plan()
    path.write_bytes(content + bytes(512))
    with pytest.raises(Changed):
        folder.rows()
    [old, *_] = folder.rows(on_changed="retag")
    assert old.rejected is not None
    assert (old.key, old.rejected.reason) == (name, "changed")
    path.unlink()
    folder.write("b.jpg", JPEG)
    with pytest.raises(NotFound):
        folder.rows()
    rows = folder.rows(on_missing="reject")
    assert outcomes(rows) == [(name, "missing"), (name, "missing"), ("b.jpg", None)]
    if name != "a.jpg":
        # An archive is one row, and what it held is said.
        assert rows[0].lost == pytest.approx(29, abs=2)
        assert rows[0].rejected is not None
        assert "images are lost" in rows[0].rejected.detail


def test_the_output_is_never_its_own_input(folder: Folder) -> None:
    folder.write("a.jpg", JPEG)
    folder.write("out/data/000000-000000-0123456789ab.parquet", b"x")
    folder.write("out/fingerprint.json", b"{}")
    assert folder.plan(output=str(folder.input / "out")).inputs == 1
    assert folder.plan(output=str(folder.input / "out")).inputs == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"input": "nowhere/at/all"}, "nowhere/at/all does not exist"),
        ({}, "no image, tar or Parquet file under .*1 .md files skipped"),
        ({"parquet": {"image_column": "photo"}}, "has no column 'photo'; it has n"),
    ],
)
def test_nothing_to_do_says_so(folder: Folder, keys: dict[str, Any], message: str) -> None:
    folder.write("readme.md", b"x")
    if "parquet" in keys:
        pq.write_table(pa.table({"n": [1]}), folder.input / "numbers.parquet")
    with pytest.raises(ConfigError, match=message):
        folder.plan(**keys)


def test_odd_files_in_a_folder(folder: Folder) -> None:
    folder.write("a.jpg", JPEG)
    (folder.input / "gone.jpg").symlink_to(folder.input / "nowhere.jpg")
    os.mkfifo(folder.input / "pipe.jpg")
    report = folder.plan()
    assert report.inputs == 1
    assert report.skipped.counts == {"broken links and special files": 2}


def test_a_plan_has_as_many_files_as_it_needs(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.planning.packing.SEGMENT_SHARDS", 3)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [JPEG] * 20}), buffer, row_group_size=2)
    folder.write("a.parquet", buffer.getvalue())
    for number in range(20):
        folder.write(f"b/{number:02}.jpg", JPEG)
    report = folder.plan(rows_per_shard=2)
    assert (report.inputs, report.shards, report.rows) == (21, 20, 40)
    refs = list(list_shards(Output(str(folder.output), OPTIONS)))
    by_file = Counter(ref.segment.rpartition("/")[2] for ref in refs)
    # The parts of one input stay together: a planning that ends between two files must not lose the later ones.
    assert list(by_file.values()) == [10, 3, 3, 3, 1]
    assert [ref.rows for ref in refs] == [2] * 20
    assert len(folder.rows(rows_per_shard=2)) == 40
    assert folder.plan(rows_per_shard=2).inputs == 0


def test_the_same_inputs_give_the_same_order(folder: Folder) -> None:
    for number in range(60):
        folder.write(f"{number:03}.jpg", JPEG)
    for number in range(0, 60, 4):
        folder.write(f"{number:03}.tar", make_tar([(f"in {number}.jpg", JPEG)]))
    keys = [row.key for row in folder.rows()]
    names = sorted(path.name for path in folder.input.iterdir())
    assert [key if key.endswith(".jpg") else f"{key[3:]:0>3}.tar" for key in keys] == names


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_files_over_100_mb(folder: Folder, kind: str) -> None:
    noise = np.random.default_rng(0)
    images = [noise.integers(0, 256, size, np.uint8).tobytes() for size in (30 << 20, 1, 50 << 20, 9 << 20, 20 << 20)]
    if kind == "tar":
        folder.write("big.tar", make_tar([(f"{n}.jpg", data) for n, data in enumerate(images)]))
    else:
        pq.write_table(pa.table({"image": images, "id": [str(n) for n in range(5)]}), folder.input / "big.parquet")
    rows = folder.rows()
    assert [row.rejected for row in rows] == [None] * 5
    assert [hashlib.sha256(row.data or b"").digest() for row in rows] == [hashlib.sha256(i).digest() for i in images]
