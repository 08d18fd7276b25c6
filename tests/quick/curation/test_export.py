"""What exports have in common: which rows, which files, what is refused, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import sightline
from benchmarks.outputs import SyntheticOutput, write_output
from curation.export.destination import find_partial
from curation.export.export import TARGETS, export_output
from curation.export.images import Images, find_extension
from curation.export.job import Job
from curation.export.names import Repeats, add_tag, make_path, make_word
from curation.export.rows import describe, dump
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from sightline.cli import app
from sightline.commands.curation.export import To
from siglip.labels import LabelSet
from storage.settings import ConfigError
from storage.store import StoreError, StoreOptions
from tests.support.exports import KEYS, ROWS, draw, make_key, make_output, read_rows, write_images
from tests.support.vectors import draw_vectors


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)], env={"COLUMNS": "300"})


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    return make_output(tmp_path_factory.mktemp("export") / "out")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    """An output without thumbnails."""
    return make_output(tmp_path_factory.mktemp("export") / "plain", thumbnails=False)


def read_keys(path: Path) -> list[str]:
    """The keys of an export to coco."""
    return [image["key"] for image in json.loads(path.read_text())["images"]]


def test_the_command_and_the_package_have_the_same_targets() -> None:
    assert tuple(one.value for one in To) == TARGETS
    text = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "200"}).stdout
    for word in ("--to", "--where", "--keep", "--images", "--thumbnails", *TARGETS):
        assert word in text


def test_every_row_is_counted_once(output: TaggedOutput, tmp_path: Path) -> None:
    kept = [make_key(row) for row in range(10, 50) if make_key(row) != "same.jpg"]
    where = "len(labels) > 0"
    keep = [key for key in kept if "\n" not in key]
    (tmp_path / "list.txt").write_bytes("\n".join(keep).encode())
    result = invoke(
        output.uri, tmp_path / "coco.json", "--to", "coco", "--where", where, "--keep", tmp_path / "list.txt"
    )
    assert result.exit_code == 0, result.stderr
    rows = read_rows(output)
    wanted = [row["key"] for row in rows.values() if row["key"] in keep and row["labels"]]
    assert read_keys(tmp_path / "coco.json") == wanted
    left = len(keep) - len(wanted)
    assert 0 < left < len(keep)
    assert result.stdout == (
        f"{len(wanted)} images are in {tmp_path}/coco.json; left out: {ROWS - len(keep)} by --keep, {left} by --where; "
        "1 rejected rows are not exported\n"
    )


@pytest.mark.parametrize("column", ["id", "key", "text"])
def test_a_list_has_keys_or_ids(output: TaggedOutput, tmp_path: Path, column: str) -> None:
    rows = list(read_rows(output).values())
    chosen = [rows[3], rows[40], rows[19]]
    path = tmp_path / "list.parquet"
    if column == "text":  # keys and ids, with a byte order mark and Windows' line ends
        path = tmp_path / "list"
        path.write_bytes(f"\ufeff{rows[3]['key']}\r\n\r\n{rows[40]['id']}\r\n{rows[19]['key']}".encode())
    else:
        pq.write_table(pa.table({"other": [1, 2, 3], column: [row[column] for row in chosen]}), path)
    done = export_output(output, "coco", tmp_path / "coco.json", keep=path)
    assert read_keys(tmp_path / "coco.json") == [rows[row]["key"] for row in (3, 19, 40)]
    assert (done.images, done.without_keep, done.without_where) == (3, ROWS - 3, 0)


def test_a_key_of_several_images_selects_all_of_them_and_says_so(output: TaggedOutput, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("same.jpg\na.jpg\nsame.jpg\n")
    done = export_output(output, "coco", tmp_path / "coco.json", keep=tmp_path / "list")
    assert read_keys(tmp_path / "coco.json") == ["a.jpg", "same.jpg", "same.jpg"]
    assert (
        "1 keys are those of several images, 2 in all, such as 'same.jpg': all of them are exported" in done.notices[0]
    )


def test_lines_that_name_no_image_are_refused_with_their_number(output: TaggedOutput, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("a.jpg\nnobody.jpg\n000000-000000/99999\n")
    result = invoke(output.uri, tmp_path / "coco.json", "--to", "coco", "--keep", tmp_path / "list")
    assert result.exit_code == 2
    assert "2 of 3 lines name no image" in result.stderr
    assert not (tmp_path / "coco.json").exists()


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (b"", "list", "it is empty"),
        (b"\xff\xfe\0", "list", "not a text file in UTF-8"),
        (b"no parquet", "list.parquet", "not a Parquet file"),
        (None, "gone", "No such file"),
        (pa.table({"a": [1]}), "list.parquet", "neither a column id nor a column key"),
        (pa.table({"key": ["a.jpg", None]}), "list.parquet", "has nulls"),
        (pa.table({"id": [[1]]}), "list.parquet", "not a Parquet file with texts"),
    ],
)
def test_a_list_that_cannot_be_read_is_one_line(
    output: TaggedOutput, tmp_path: Path, content: Any, name: str, says: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        pq.write_table(content, tmp_path / name)
    with pytest.raises(ConfigError, match=says) as error:
        export_output(output, "coco", tmp_path / "coco.json", keep=tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("to", TARGETS)
def test_a_destination_that_is_not_empty_is_never_touched(output: TaggedOutput, tmp_path: Path, to: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link", "file/below"):
        with pytest.raises(ConfigError):
            export_output(output, to, tmp_path / name)
    with pytest.raises(ConfigError, match="written to a local path"):
        export_output(output, to, "s3://bucket/x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file", "full", "link"]
    assert (tmp_path / "full/a").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("to", TARGETS)
def test_a_new_folder_below_new_folders_and_an_empty_one_are_written(
    output: TaggedOutput, tmp_path: Path, to: str
) -> None:
    thumbnails = to not in ("qdrant", "coco", "xmp")
    export_output(output, to, tmp_path / "new/newer", where="row = 1", thumbnails=thumbnails)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["newer"]
    if to != "coco":
        (tmp_path / "empty").mkdir()
        done = export_output(output, to, tmp_path / "empty", where="row = 1", thumbnails=thumbnails)
        assert done.images == 3
        assert [path.name for path in tmp_path.iterdir()].count("empty") == 1


@pytest.mark.parametrize("to", TARGETS)
def test_nothing_selected_and_a_failure_leave_no_destination(
    output: TaggedOutput, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thumbnails = to not in ("qdrant", "coco", "xmp")
    with pytest.raises(ConfigError, match="no image is left"):
        export_output(output, to, tmp_path / "new", where="row = 999", thumbnails=thumbnails)
    assert list(tmp_path.iterdir()) == []

    def stop(job: Job, rows: int) -> None:
        job.exported += rows
        if job.exported > 10:
            raise StoreError("the store is away")

    monkeypatch.setattr(Job, "_count", stop)
    with pytest.raises(StoreError, match=r"^the store is away$"):
        export_output(output, to, tmp_path / "new", thumbnails=thumbnails)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["hf", "lancedb", "qdrant", "webdataset"])
def test_an_embedding_that_is_not_finite_is_never_exported(
    output: TaggedOutput, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(batch: pa.RecordBatch) -> Any:
        vectors = read_embeddings(batch).copy()
        vectors[batch["row"].to_numpy() == 7, 2] = np.nan
        return vectors

    monkeypatch.setattr("curation.export.job.read_embeddings", read)
    with pytest.raises(StoreError, match="the embedding of 000000-000000/7 is not finite: the output is damaged"):
        export_output(output, to, tmp_path / "new", thumbnails=to != "qdrant")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_destination_and_the_next_one_says_what_it_left(
    output: TaggedOutput, tmp_path: Path
) -> None:
    code = (
        "import os, signal, sys\n"
        "from curation.export.targets import webdataset\n"
        "from curation.export.export import export_output\n"
        "from curation.tagged_output import open_output\n"
        "add = webdataset._add\n"
        "def stop(tar, name, data):\n"
        "    add(tar, name, data)\n"
        "    if tar.offset > 60_000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "webdataset._add = stop\n"
        "export_output(open_output(sys.argv[1]), 'webdataset', sys.argv[2], thumbnails=True)\n"
    )
    command = [sys.executable, "-c", code, output.uri, str(tmp_path / "tars")]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "tars").exists()
    [left] = find_partial(tmp_path / "tars")
    done = export_output(output, "webdataset", tmp_path / "tars", thumbnails=True)
    assert done.notices[0] == f"{left} was left behind by an export that was killed: remove it"
    assert done.images == ROWS


def test_images_come_from_the_folder_then_from_their_source(tmp_path: Path) -> None:
    sources = []
    for row in range(ROWS):
        path = tmp_path / f"originals/{row}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(draw(row))
        sources.append(str(path))
    output = make_output(tmp_path / "out", sources=sources)
    (tmp_path / "originals/31.png").write_bytes(draw(99))  # another image than the one that was tagged
    (tmp_path / "originals/32.png").unlink()
    (tmp_path / "originals/34.png").write_bytes(draw(99))
    folder = tmp_path / "folder"
    for row, data in ((31, draw(31)), (33, draw(77)), (34, draw(77))):
        (folder / make_key(row)).parent.mkdir(parents=True, exist_ok=True)
        (folder / make_key(row)).write_bytes(data)
    result = invoke(output.uri, tmp_path / "tars", "--to", "webdataset", "--images", folder)
    assert result.exit_code == 1
    assert (
        f"2 images have no file: {make_key(32)} ({sources[32]} is not there), "
        f"{make_key(34)} ({sources[34]} is not the file that was tagged)"
    ) in result.stderr
    assert f"2 files in {folder} are not the files that were tagged: not taken" in result.stderr
    assert f"{ROWS - 2} images are in {tmp_path}/tars; left out: 2 without a file; 1 rejected" in result.stdout
    with tarfile.open(tmp_path / "tars/shard-000000.tar") as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames() if name.endswith("png")}  # type: ignore[union-attr]
    assert len(files) == ROWS - 2
    for row in range(len(KEYS), ROWS):
        if row not in (32, 34):
            assert files[f"plain_{row:05d}.png"] == draw(row), row
    result = invoke(output.uri, tmp_path / "mixed", "--to", "webdataset", "--images", folder, "--thumbnails")
    assert result.exit_code == 0, result.stderr
    assert f"{ROWS - 1} images are thumbnails" in result.stderr, "sources are not read"


def test_images_that_are_held_are_bounded_in_number_and_bytes(
    plain: TaggedOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", plain)
    [batch] = list(plain.batches(["id", "key", "source", "sha256"]))[-1:]
    images = Images(str(tmp_path / "images"), False, StoreOptions())
    monkeypatch.setattr("curation.export.images.HELD_BYTES", 3 * len(draw(40)))
    counts = [len(part) for part in images.read(batch)]
    assert (sum(counts), max(counts)) == (len(batch), 3)
    monkeypatch.setattr("curation.export.images.HELD_BYTES", 1)
    assert [len(part) for part in images.read(batch)] == [1] * len(batch)
    monkeypatch.setattr("curation.export.images.ROWS", 4)
    monkeypatch.setattr("curation.export.images.HELD_BYTES", 2**20)
    assert max(len(part) for part in images.read(batch)) == 4
    images.close()


def test_a_random_condition_selects_the_same_rows_in_all_passes(output: TaggedOutput, tmp_path: Path) -> None:
    for number in range(3):
        done = export_output(output, "coco", tmp_path / f"{number}.json", where="random() < 0.5")
        content = json.loads((tmp_path / f"{number}.json").read_text())
        rows = read_rows(output)
        labels = [rows[image["row_id"]]["labels"] for image in content["images"]]
        assert len(labels) == done.images == ROWS - done.without_where
        names = {one["id"]: one["name"] for one in content["categories"]}
        found: list[list[str]] = [[] for _ in labels]
        for one in content["annotations"]:
            found[one["image_id"] - 1].append(names[one["category_id"]])
        assert found == labels


def test_the_own_column_id_is_exported_under_another_name(tmp_path: Path) -> None:
    passed = pa.schema([("id", pa.int64()), ("file_name", pa.string())])
    labels = LabelSet.model_validate({"names": ["cat"]})
    made = SyntheticOutput(
        labels,
        draw_vectors(1, 16, 5),
        2,
        lambda shard: draw_vectors(10, 16, shard),
        passed=passed,
        values=lambda rows: {"id": [7 * row for row in rows], "file_name": [f"mine {row}" for row in rows]},
    )
    write_output(str(tmp_path / "out"), made)
    output = open_output(str(tmp_path / "out"))
    done = export_output(output, "hf", tmp_path / "hf")
    assert "the output's own column id is called input_id: id identifies the row in the output" in done.notices
    table = pq.read_table(tmp_path / "hf/data")
    assert table["input_id"].to_pylist() == [7 * row for row in range(20)]
    assert table["id"].to_pylist() == output.take(range(20), ["id"])["id"].to_pylist()
    assert output.take([3], ["input_id", "id", "key"]).to_pylist()[0]["input_id"] == 21
    export_output(output, "coco", tmp_path / "coco.json")
    image = json.loads((tmp_path / "coco.json").read_text())["images"][4]
    assert (image["id"], image["file_name"], image["input_file_name"], image["input_id"]) == (
        5,
        "image 00000004",
        "mine 4",
        28,
    )
    for where, keys in (("input_id = 21", [3]), (f"id = '{table['id'][5].as_py()}'", [5]), ("INPUT_ID < 8", [0, 1])):
        path = tmp_path / f"where {keys}.json"
        export_output(output, "coco", path, where=where)
        assert read_keys(path) == [f"image {key:08d}" for key in keys]
    for to in ("lancedb", "qdrant", "xmp"):
        assert export_output(output, to, tmp_path / to).images == 20


def test_images_in_archives_have_no_file_without_a_folder(output: TaggedOutput, tmp_path: Path) -> None:
    result = invoke(output.uri, tmp_path / "new", "--to", "imagefolder")
    assert result.exit_code == 2
    assert f"none of {ROWS} images has a file, such as photos/2024/a.jpg (it is in the archive made/000000.tar)" in (
        result.stderr
    )
    assert not (tmp_path / "new").exists()


def test_thumbnails_are_only_written_when_they_are_asked_for(
    output: TaggedOutput, plain: TaggedOutput, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", output)
    done = export_output(output, "fiftyone", tmp_path / "fo", images=tmp_path / "images", thumbnails=True)
    assert done.without_file == 0
    [notice] = [one for one in done.notices if one.endswith("images are thumbnails")]
    count = int(notice.split()[0])
    assert 0 < count < len(KEYS), "of the keys that are no paths"
    with pytest.raises(ConfigError, match="has no thumbnails: tag with `thumbnails: true`"):
        export_output(plain, "fiftyone", tmp_path / "other", thumbnails=True)
    with pytest.raises(ConfigError, match="takes no images"):
        export_output(output, "coco", tmp_path / "coco.json", thumbnails=True)
    with pytest.raises(ConfigError, match="there is no such folder, or it has no files"):
        export_output(output, "fiftyone", tmp_path / "other", images=tmp_path / "nowhere")


def test_a_key_cannot_lead_out_of_the_folder_of_images(plain: TaggedOutput, tmp_path: Path) -> None:
    (tmp_path / "escape.jpg").write_bytes(draw(KEYS.index("x/../../../escape.jpg")))
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/b/c/a.jpg").write_bytes(draw(KEYS.index("a.jpg")))
    (tmp_path / "list").write_text("x/../../../escape.jpg\na.jpg\n")
    done = export_output(plain, "webdataset", tmp_path / "tars", images=tmp_path / "a/b/c", keep=tmp_path / "list")
    assert (done.images, done.without_file) == (1, 1)


def test_a_key_without_a_suffix_finds_its_file(tmp_path: Path) -> None:
    """A tar's samples have such keys, and files with a suffix when it is unpacked."""
    output = make_output(tmp_path / "out")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/no_extension.jpg").write_bytes(draw(1))
    (tmp_path / "images/no_extension.png").write_bytes(draw(KEYS.index("no_extension")))
    done = export_output(
        output, "webdataset", tmp_path / "tars", images=tmp_path / "images", where="key = 'no_extension'"
    )
    assert (done.images, done.notices) == (1, ())


@pytest.mark.parametrize("to", [one for one in TARGETS if one != "qdrant"])
def test_memory_does_not_grow_with_the_output(tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qdrant's embedded mode holds all points. What LanceDB holds itself is not counted.

    The large output is exported twice, since threads that other tests left behind may allocate at the same time.
    """
    for name in ("hf._ROWS", "hf._IMAGE_ROWS", "imagefolder._GROUP_ROWS", "lancedb._ROWS", "coco._ROWS", "xmp._ROWS"):
        monkeypatch.setattr(f"curation.export.targets.{name}", 32)
    monkeypatch.setattr("curation.export.targets.webdataset.SHARD_SAMPLES", 50)
    monkeypatch.setattr("curation.export.selection._ROWS", 32)
    labels = LabelSet.model_validate({"names": ["cat", "dog"]})
    picture = draw(1) + bytes(4000)
    peaks = []
    for step, shards in enumerate((1, 2, 8, 8)):
        made = SyntheticOutput(
            labels,
            draw_vectors(2, 512, 5),
            shards,
            lambda shard: draw_vectors(60, 512, shard),
            thumbnail=lambda row: picture,
        )
        write_output(str(tmp_path / f"out{step}"), made)
        output = open_output(str(tmp_path / f"out{step}"))
        pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
        pa.set_memory_pool(pool)
        if shards > 1:  # the first export imports modules, and tracing makes that slow
            tracemalloc.start()
        try:
            done = export_output(output, to, tmp_path / f"{to}{step}", thumbnails=to not in ("coco", "xmp"))
            peaks.append(pool.max_memory() + tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(before)
        assert done.images == 60 * shards
    assert min(peaks[2:]) < 1.3 * peaks[1], peaks


def test_the_python_api_exports(output: TaggedOutput, tmp_path: Path) -> None:
    opened = sightline.open_output(output.uri)
    done = opened.export("hf", tmp_path / "hf", where="row < 2", thumbnails=True)
    assert (done.images, done.without_where, done.destination) == (6, ROWS - 6, str(tmp_path / "hf"))
    with pytest.raises(ConfigError, match="the targets are fiftyone, hf"):
        opened.export("csv", tmp_path / "csv")  # type: ignore[arg-type]


def test_paths_of_keys_are_the_keys_where_they_can_be() -> None:
    for key in ("a.jpg", "日本/写真 🐈.jpg", "with space/'q\".jpg", ".hidden", "-x", "a:b*?.jpg"):
        assert make_path(key) == key
    for key in [*KEYS, "..", "", "/", "a//b", "../..", "\0", "x" * 5000, "🐈" * 100]:
        path = make_path(key)
        assert path
        assert not path.startswith("/")
        assert all(part not in ("", ".", "..") and len(part.encode()) <= 200 for part in path.split("/"))
        assert len(path.encode()) <= 1000
    assert make_path("k" * 400 + "1") != make_path("k" * 400 + "2")
    assert add_tag("a/b.c/d.jpg", "x/1").startswith("a/b.c/d-")
    assert add_tag(".hidden", "x/1").startswith(".hidden-")


def test_words_of_keys_are_plain() -> None:
    assert [make_word(key) for key in ("a.jpg", "a/b c.PNG", "v1.2/x", "日本.jpg", "")] == [
        "a",
        "a_b_c",
        "v1_2_x",
        "_",
        "image",
    ]
    assert all(len(make_word(key)) <= 64 and make_word(key).isascii() for key in KEYS)


def test_repeated_names_are_found() -> None:
    repeats = Repeats(["a", "b", "A", "b", "c", "b"])
    assert [name in repeats for name in ("a", "A", "b", "c", "nothing")] == [False, False, True, False, False]
    assert (len(repeats), repeats.rows) == (1, 6)
    assert len(Repeats([])) == 0
    assert "a" not in Repeats([])


def test_extensions_follow_the_content() -> None:
    for format, extension in (("JPEG", "jpg"), ("PNG", "png"), ("GIF", "gif"), ("WEBP", "webp"), ("BMP", "bmp")):
        assert find_extension(draw(1, format)) == extension
    assert find_extension(draw(1, "TIFF")) == "tif"
    assert find_extension(draw(1, "AVIF")) == "avif"
    assert find_extension(b"text") is None


def test_columns_id_and_input_id_are_refused_together(tmp_path: Path) -> None:
    labels = LabelSet.model_validate({"names": ["cat"]})
    made = SyntheticOutput(
        labels,
        draw_vectors(1, 16, 0),
        1,
        lambda shard: draw_vectors(3, 16, shard),
        passed=pa.schema([("id", pa.int64()), ("input_id", pa.int64())]),
        values=lambda rows: {"id": list(rows), "input_id": list(rows)},
    )
    write_output(f"{tmp_path}/tags", made)
    with pytest.raises(ConfigError, match=r"input\.parquet\.columns: \{id: original_id\}"):
        export_output(open_output(f"{tmp_path}/tags"), "coco", tmp_path / "a.json")


def test_any_column_becomes_json() -> None:
    table = pa.table(
        {
            "ns": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")),
            "zone": pa.array([1_700_000_000], pa.timestamp("s", "Europe/Berlin")),
            "day": pa.array([19000], pa.date32()),
            "time": pa.array([1], pa.time64("ns")),
            "span": pa.array([5], pa.duration("ns")),
            "big": pa.array([2**64 - 1], pa.uint64()),
            "nan": pa.array([float("nan")], pa.float32()),
            "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
            "dictionary": pa.array(["x"]).dictionary_encode(),
            "bytes": pa.array([b"\xff"], pa.binary()),
            "text": pa.array(["\u2028 \x00 \U0001f408"]),
            "half": pa.array(np.array([0.5], np.float16)),
            "far": pa.array([2**62], pa.timestamp("s")),
            "farther": pa.array([2**30], pa.date32()),
            "negative": pa.array([-1], pa.int64()).cast(pa.time64("us")),
        }
    )
    [batch] = table.to_batches()
    [row] = [json.loads(dump(one)) for one in describe(batch)]
    assert row == {
        "ns": "2023-11-14T22:13:20.123456789",
        "zone": "2023-11-14T23:13:20+0100",
        "day": "2022-01-08",
        "time": "00:00:00.000000001",
        "span": "5",
        "big": 2**64 - 1,
        "nan": None,
        "map": [["a", 1]],
        "dictionary": "x",
        "bytes": "/w==",
        "text": "\u2028 \x00 \U0001f408",
        "half": 0.5,
        "far": str(2**62),
        "farther": str(2**30),
        "negative": "-1",
    }
