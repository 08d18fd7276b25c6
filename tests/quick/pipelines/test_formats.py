"""Planning and reading: every kind of input, awkward names, broken archives. No Ray, no model."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import JobConfig
from pipelines.inputs import tar
from pipelines.inputs.columns import PassedColumns
from pipelines.inputs.formats import read_inputs
from pipelines.inputs.listing import PlanReport
from pipelines.inputs.rows import Input, Reading, Row, Skipped
from pipelines.output.output import Output
from pipelines.output.plan import draft_plan, list_shards, publish_plan, read_shard_inputs
from storage.settings import ConfigError
from storage.store import Changed, NotFound, Store, StoreOptions
from tests.support.images import encode, make_rgb

OPTIONS = StoreOptions()


def extend_plan(config: JobConfig, options: StoreOptions) -> tuple[PlanReport, pa.Schema]:
    """What a run does before it reads: the report, and the types of the passed columns."""
    columns = PassedColumns(config.parquet.columns)
    with tempfile.TemporaryDirectory() as folder:
        output = Output(config.output, options)
        draft = draft_plan(config, output, columns, Path(folder))
        assert publish_plan(draft, output)
    return draft.report, columns.schema()


def read_all(config: JobConfig, options: StoreOptions, skipped: Skipped) -> list[Row]:
    """Plan what is new and read everything that is planned."""
    _, columns = extend_plan(config, options)
    output = Output(config.output, options)
    limit = config.limits.max_bytes
    reading = Reading(options, limit, config.parquet, columns, config.on_changed, config.on_missing)
    refs = list_shards(output)
    return [row for ref in refs for _, row in read_inputs(read_shard_inputs(output.store, ref), reading, skipped)]


class Folder:
    """An input folder, an output, and what planning and reading make of them."""

    def __init__(self, root: Path) -> None:
        self.input, self.output = root / "input", root / "output"
        self.input.mkdir()
        self.keys: dict[str, Any] = {}
        self.skipped = Skipped()

    def write(self, name: str, data: bytes) -> Path:
        path = self.input / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def config(self, **keys: Any) -> JobConfig:
        return JobConfig(**{"input": str(self.input), "output": str(self.output), "labels": ["a"], **self.keys, **keys})

    def plan(self, **keys: Any) -> PlanReport:
        """Append what is new to the plan."""
        return extend_plan(self.config(**keys), OPTIONS)[0]

    def rows(self, **keys: Any) -> list[Row]:
        """Plan what is new and read everything that is planned."""
        return read_all(self.config(**keys), OPTIONS, self.skipped)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


JPEG = encode(make_rgb(), "JPEG")


def make_tar(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def outcomes(rows: list[Row]) -> list[tuple[str, str | None]]:
    return [(row.key, row.rejected.reason if row.rejected else None) for row in rows]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_webdataset_samples(folder: Folder, mode: str) -> None:
    members = [
        ("0001.jpg", JPEG),
        ("0001.json", json.dumps({"caption": "ü"}).encode()),
        ("0001.cls", b"7"),
        ("0002.TXT", b"a text"),
        ("0002.JPEG", JPEG),
        ("dir/0003.left.jpg", JPEG),
        ("dir/0003.right.jpg", JPEG),
        ("dir/._0003.jpg", b"a shadow"),
        ("0004.json", b"{}"),
        ("0005.png", b""),
    ]
    folder.write("a.tar" if mode == "w" else "a.TAR.GZ", make_tar(members, mode))
    rows = folder.rows()
    assert [row.key for row in rows] == ["0001", "0002", "dir/0003.left.jpg", "dir/0003.right.jpg", "0005"]
    assert json.loads(rows[0].metadata or "") == {"json": {"caption": "ü"}, "cls": 7}
    assert json.loads(rows[1].metadata or "") == {"txt": "a text"}
    assert rows[2].metadata is None
    assert [row.data for row in rows] == [JPEG] * 4 + [b""]
    assert not any(row.rejected for row in rows)


def test_shadows_of_macos_do_not_part_a_sample(folder: Folder) -> None:
    names = ["1.jpg", "1.json", "d/2.left.jpg", "d/2.right.jpg", "d/2.txt"]
    shadows = ["._1.jpg", "._1.json", "d/._2.left.jpg", "d/._2.right.jpg", "d/._2.txt"]
    pairs = [name for pair in zip(shadows, names, strict=True) for name in pair]
    folder.write("a.tar", make_tar([(name, JPEG if name.endswith("jpg") else b"{}") for name in pairs]))
    found = [(row.key, row.metadata) for row in folder.rows()]
    assert found == [("1", '{"json": {}}'), ("d/2.left.jpg", '{"txt": "{}"}'), ("d/2.right.jpg", '{"txt": "{}"}')]
    assert folder.skipped.counts == {"hidden files": 5}


MEMBERS = [(f"{n:04d}.jpg", encode(make_rgb(300, 300, n), "JPEG")) for n in range(4)]
WHOLE = make_tar(MEMBERS)
BOUNDARY = 3 * 512 + sum(-(-len(data) // 512) * 512 for _, data in MEMBERS[:3])


@pytest.mark.parametrize(
    ("data", "whole", "reason"),
    [
        (WHOLE, 4, None),
        (WHOLE[:BOUNDARY], 3, "truncated_archive"),  # between two members: tarfile takes this for the end
        (WHOLE[: BOUNDARY + 200], 3, "truncated_archive"),  # in a header
        (WHOLE[: BOUNDARY + 512], 3, "truncated_archive"),  # behind a header
        (WHOLE[: BOUNDARY + 2000], 3, "truncated_archive"),  # in an image
        (WHOLE[:BOUNDARY] + b"garbage!" * 64 + WHOLE[BOUNDARY:], 3, "corrupt_archive"),
        (b"not a tar at all" * 100, 0, "corrupt_archive"),
        (b"", 0, "truncated_archive"),
        (bytes(10240), 0, None),
    ],
    ids=["whole", "at a member", "header", "no data", "in data", "garbage", "no tar", "empty", "no members"],
)
def test_tars_that_end_early_keep_their_whole_images(
    folder: Folder, data: bytes, whole: int, reason: str | None
) -> None:
    path = folder.write("sub dir/some.tar", data)
    rows = folder.rows()
    assert outcomes(rows) == [(f"{n:04d}", None) for n in range(whole)] + (
        [("sub dir/some.tar", reason)] if reason else []
    )
    assert {row.source for row in rows} <= {str(path)}


@pytest.mark.parametrize(("cut", "reason"), [(0.5, "truncated_archive"), (0.02, "truncated_archive")])
def test_truncated_compressed_tar(folder: Folder, cut: float, reason: str) -> None:
    data = make_tar(MEMBERS, "w:gz")
    folder.write("a.tar.gz", data[: int(len(data) * cut)])
    rows = folder.rows()
    assert rows[-1].rejected is not None
    assert rows[-1].rejected.reason == reason
    assert [row.data for row in rows[:-1]] == [data for _, data in MEMBERS[: len(rows) - 1]]
    if cut == 0.5:  # what is there before the cut is read, also of the last megabyte
        assert len(rows) > 1


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


def parquet_forms() -> Iterator[tuple[str, pa.Table, dict[str, Any], list[str]]]:
    images = [JPEG, None, JPEG]
    structs = [{"bytes": JPEG, "path": "x/1.jpg"}, None, {"bytes": JPEG, "path": None}]
    yield "bytes", pa.table({"id": [7, 8, 9], "image": pa.array(images, pa.binary())}), {}, ["0", "1", "2"]
    yield (
        "large bytes",
        pa.table({"jpg": pa.array(images, pa.large_binary()), "mask": [b"", b"", b""]}),
        {},
        ["0", "1", "2"],
    )
    yield "struct", pa.table({"image": structs, "label": [1, 2, 3]}), {}, ["x/1.jpg", "1", "2"]
    yield "keys", pa.table({"id": ["a", "b", "c"], "image": images}), {"key_column": "id"}, ["a", "b", "c"]
    uris = ["loose/1.jpg", None, "loose/2.jpg"]
    yield "uris", pa.table({"url": uris, "other": [1, 2, 3]}), {}, ["0", "1", "2"]
    yield "named", pa.table({"x": images, "y": [b"", b"", b""]}), {"image_column": "x"}, ["0", "1", "2"]


@pytest.mark.parametrize(("name", "table", "keys", "expected"), [*parquet_forms()], ids=[f[0] for f in parquet_forms()])
def test_parquet_in_every_form(
    folder: Folder, name: str, table: pa.Table, keys: dict[str, Any], expected: list[str]
) -> None:
    (folder.output.parent / "loose").mkdir()
    for number in (1, 2):
        (folder.output.parent / f"loose/{number}.jpg").write_bytes(JPEG)
    pq.write_table(table, folder.input.parent / "images.parquet", row_group_size=2)
    columns = [c for c in ("label", "other") if c in table.schema.names]
    rows = folder.rows(
        input=str(folder.input.parent / "images.parquet"), parquet={**keys, "columns": columns}, rows_per_shard=2
    )
    assert [row.key for row in rows] == expected
    assert [row.data for row in rows] == [JPEG, None, JPEG]
    assert [row.rejected.reason if row.rejected else None for row in rows] == [None, "missing", None]
    found = [{name: value[0].as_py() for name, value in row.columns.items()} for row in rows]
    assert found == [{c: table[c][n].as_py() for c in columns} for n in range(3)]
    assert folder.plan(input=str(folder.input.parent / "images.parquet"), parquet=keys).inputs == 0


def test_a_broken_parquet_file_is_a_row(folder: Folder) -> None:
    folder.write("a.parquet", b"PAR1 and then nothing like it")
    folder.write("b.jpg", JPEG)
    assert outcomes(folder.rows()) == [("a.parquet", "corrupt_archive"), ("b.jpg", None)]


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


@pytest.mark.parametrize("suffix", ["txt", "csv"])
def test_lists_of_uris(folder: Folder, suffix: str) -> None:
    folder.write("images/a 1.jpg", JPEG)
    folder.write("images/b#2.jpg", JPEG)
    uris = ["images/a 1.jpg", str(folder.input / "images/b#2.jpg"), "images/gone.jpg", "http://host/x.jpg"]
    path = folder.input / f"list.{suffix}"
    if suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["id", "url"], *([n, uri] for n, uri in enumerate(uris))])
    else:
        path.write_text("\n".join(["# a comment", *uris, ""]))
    rows = folder.rows(input=str(path))
    assert outcomes(rows) == list(zip(uris, [None, None, "missing", "unreadable"], strict=True))
    assert rows[0].metadata == ('{"id": "0"}' if suffix == "csv" else None)
    if suffix == "txt":
        path.write_text("\n".join([*uris, "images/a 1.jpg", "images/c.jpg"]))
        assert folder.plan(input=str(path)).inputs == 1


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
    folder.write("out/data/old.parquet", b"x")
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


def test_members_that_are_no_images_are_counted(folder: Folder) -> None:
    names = ["a.jpg", "a.json", "b.jxl", "c.JXL", "d.mp4", "e.avif", "f", "._g.jpg", ".hidden"]
    buffer = io.BytesIO(make_tar([(name, JPEG) for name in names]))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo("linked.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        folder_member = tarfile.TarInfo("folder")
        folder_member.type = tarfile.DIRTYPE
        for member in (link, folder_member):
            tar.addfile(member)
    folder.write("a.tar", buffer.getvalue())
    assert [row.key for row in folder.rows()] == ["a", "e"]
    assert folder.skipped.counts == {
        ".jxl files": 2,
        ".mp4 files": 1,
        "files without an extension": 2,
        "hidden files": 1,
        "links and devices in tars": 1,
    }


def test_metadata_may_be_anything(folder: Folder) -> None:
    deep, half, number = b"[" * 100_000, b'{"a": "\\ud800"}', b"7" * 5000
    members = [("0.jpg", JPEG), ("0.json", deep), ("1.jpg", JPEG), ("1.json", half), ("2.jpg", JPEG), ("2.cls", number)]
    folder.write("a.tar", make_tar([*members, ("3.jpg", JPEG), ("3.cls", "²".encode())]))
    texts = [row.metadata or "" for row in folder.rows()]
    assert len(texts) == 4
    for text in texts:
        text.encode()
        json.loads(text)


def test_odd_files_in_a_folder(folder: Folder) -> None:
    folder.write("a.jpg", JPEG)
    (folder.input / "gone.jpg").symlink_to(folder.input / "nowhere.jpg")
    os.mkfifo(folder.input / "pipe.jpg")
    report = folder.plan()
    assert report.inputs == 1
    assert report.skipped.counts == {"broken links and special files": 2}


def test_a_plan_has_as_many_files_as_it_needs(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.output.plan.SEGMENT_SHARDS", 3)
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


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"key_column": "id"}, r"parquet\.key_column: .*a\.parquet has no column 'id'; it has image, n, deep"),
        ({"image_column": "n"}, r"parquet\.image_column: 'n' of .*a\.parquet is int64: expected binary"),
        ({"image_column": "deep"}, r"'deep' of .* is struct<x: int64>: expected binary"),
        ({"columns": ["colour"]}, "no Parquet input has a column 'colour'"),
    ],
)
def test_columns_that_are_not_there_or_of_no_use_are_refused(folder: Folder, keys: Any, message: str) -> None:
    pq.write_table(pa.table({"image": [JPEG], "n": [1], "deep": [{"x": 1}]}), folder.input / "a.parquet")
    with pytest.raises(ConfigError, match=message):
        folder.plan(parquet=keys)
