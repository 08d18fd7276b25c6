"""Exports as datasets, read back with the libraries that people read them with."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import tarfile
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation.export.export import export_output
from curation.export.targets import hf, imagefolder, webdataset
from curation.tagged_output import TaggedOutput
from tests.support.exports import KEYS, LABELS, ROWS, WIDTH, draw, make_output, read_rows, write_images


@pytest.fixture(scope="module", params=["float32", "float16"])
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    half = request.param == "float16"
    return make_output(
        tmp_path_factory.mktemp("datasets") / "out", dtype=request.param, passed=half, bands=half, thumbnails=True
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    """An output without thumbnails and without columns of its own."""
    return make_output(tmp_path_factory.mktemp("datasets") / "plain", thumbnails=False)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`datasets.load_dataset` with a cache of its own."""
    import datasets

    datasets.disable_progress_bars()
    # The environment variable is read when the library is imported, and would hold for the tests after these.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    def run(*arguments: Any, **named: Any) -> Any:
        return datasets.load_dataset(*arguments, cache_dir=str(tmp_path / "cache"), **named)

    return run


def check(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The columns that every target has, but for the image."""
    assert found["key"] == wanted["key"]
    assert found["labels"] == wanted["labels"]
    assert np.array_equal(np.asarray(found["scores"], np.float32), wanted["scores"])
    assert (found["width"], found["height"], found["row"]) == (640, 480, wanted["row"])
    assert (found["source"], found["sha256"]) == (wanted["source"], wanted["sha256"])
    if "bands" in wanted:
        assert found["bands"] == wanted["bands"]


def test_the_outputs_of_these_tests_have_all_cases(output: TaggedOutput) -> None:
    rows = read_rows(output)
    counts = [len(row["labels"]) for row in rows.values()]
    assert (len(rows), min(counts), max(counts)) == (ROWS, 0, 3)
    assert {label for row in rows.values() for label in row["labels"]} == set(LABELS)
    assert [row["key"] for row in rows.values()][: len(KEYS)] == KEYS


def test_datasets_loads_the_parquet_export_with_images(output: TaggedOutput, load: Any, tmp_path: Path) -> None:
    import datasets

    done = export_output(output, "hf", tmp_path / "hf", thumbnails=True)
    assert (done.images, done.without_file, done.rejected) == (ROWS, 0, 1)
    names = [path.name for path in (tmp_path / "hf/data").iterdir()]
    assert names == ["train-00000-of-00001.parquet"]
    found = load(str(tmp_path / "hf"))
    assert list(found) == ["train"]
    found = found["train"]
    assert isinstance(found.features["image"], datasets.Image)
    assert found.features["embedding"].length == WIDTH
    assert found.features["embedding"].feature.dtype == "float32"
    rows = read_rows(output)
    assert len(found) == len(rows)
    for one in found:
        wanted = rows.pop(one["id"])
        check(one, wanted)
        assert np.array_equal(np.asarray(one["embedding"], np.float32), wanted["vector"])
        assert one["image"].size == (12, 8)
        if "caption" in wanted:
            assert one["caption"] == wanted["caption"]
            assert one["taken"] == wanted["taken"]
            assert one["raw"] == wanted["raw"]
            assert one["box"] == wanted["box"]
    images = found.cast_column("image", datasets.Image(decode=False))
    stored = output.to_arrow(["thumbnail"])["thumbnail"].to_pylist()
    assert [image["bytes"] for image in images["image"]] == stored


def test_a_dataset_without_images_has_all_other_columns(plain: TaggedOutput, load: Any, tmp_path: Path) -> None:
    done = export_output(plain, "hf", tmp_path / "hf")
    assert done.notices == ("the dataset has no images: --images DIR or --thumbnails adds them",)
    found = load(str(tmp_path / "hf"), split="train")
    assert found.column_names == [
        "id",
        "key",
        "source",
        "row",
        "width",
        "height",
        "labels",
        "scores",
        "sha256",
        "metadata",
        "embedding",
    ]
    rows = read_rows(plain)
    for one in found:
        check(one, rows.pop(one["id"]))
    assert not rows


def test_the_card_names_all_labels_and_is_valid(plain: TaggedOutput, tmp_path: Path) -> None:
    from huggingface_hub import DatasetCard

    export_output(plain, "hf", tmp_path / "hf")
    card = DatasetCard.load(str(tmp_path / "hf/README.md"))
    assert card.data.to_dict()["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    block = card.text.split("```json\n")[1].split("```")[0]
    assert json.loads(block) == LABELS


def test_shards_and_row_groups_are_bounded(
    output: TaggedOutput, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "SHARD_BYTES", 8000)
    monkeypatch.setattr(hf, "_IMAGE_ROWS", 10)
    monkeypatch.setattr("curation.export.images.ROWS", 5)
    export_output(output, "hf", tmp_path / "hf", thumbnails=True)
    paths = sorted((tmp_path / "hf/data").iterdir())
    assert len(paths) > 2
    assert [path.name for path in paths] == [
        f"train-{number:05d}-of-{len(paths):05d}.parquet" for number in range(len(paths))
    ]
    groups = [pq.ParquetFile(path).metadata.row_group(0).num_rows for path in paths]
    assert set(groups) == {10}
    found = load(str(tmp_path / "hf"), split="train")
    assert found["id"][:] == output.to_arrow(["id"])["id"].to_pylist()


def test_datasets_loads_the_image_folder(output: TaggedOutput, load: Any, tmp_path: Path) -> None:
    import datasets

    done = export_output(output, "imagefolder", tmp_path / "folder", thumbnails=True)
    assert done.images == ROWS
    found = load("imagefolder", data_dir=str(tmp_path / "folder"))
    assert list(found) == ["train"], "keys with test and val in them make no splits"
    found = found["train"]
    rows = read_rows(output)
    thumbnails = dict(zip(rows, output.to_arrow(["thumbnail"])["thumbnail"].to_pylist(), strict=True))
    assert len(found) == len(rows)
    assert isinstance(found.features["image"], datasets.Image)
    for one in found.cast_column("image", datasets.Image(decode=False)):
        wanted = rows.pop(one["id"])
        check(one, wanted)
        assert np.array_equal(np.asarray(one["embedding"], np.float32), wanted["vector"])
        data = one["image"]["bytes"] or Path(one["image"]["path"]).read_bytes()
        assert data == thumbnails[one["id"]]


def test_a_folder_of_the_image_folder_has_a_bounded_number_of_files(
    plain: TaggedOutput, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagefolder, "FOLDER_FILES", 25)
    write_images(tmp_path / "images", plain)
    keys = plain.to_arrow(["key"])["key"].to_pylist()
    (tmp_path / "list").write_text("\n".join(keys[-30:]))
    done = export_output(plain, "imagefolder", tmp_path / "folder", images=tmp_path / "images", keep=tmp_path / "list")
    assert (done.images, done.without_keep) == (30, 30)
    counts = [len(list(path.iterdir())) for path in sorted((tmp_path / "folder/train").iterdir()) if path.is_dir()]
    assert counts == [25, 5]
    assert len(load("imagefolder", data_dir=str(tmp_path / "folder"), split="train")) == 30


def test_images_without_a_file_are_in_no_line_of_the_metadata(plain: TaggedOutput, load: Any, tmp_path: Path) -> None:
    """`datasets` refuses a line whose file is missing."""
    write_images(tmp_path / "images", plain)
    for row in range(40, 50):
        (tmp_path / f"images/plain/{row:05d}.png").unlink()
    done = export_output(
        plain, "imagefolder", tmp_path / "folder", images=tmp_path / "images", where="key like 'plain/%'"
    )
    assert (done.images, done.without_file, len(done.missing)) == (ROWS - len(KEYS) - 10, 10, 10)
    found = load("imagefolder", data_dir=str(tmp_path / "folder"), split="train")
    assert [int(key[6:-4]) for key in found["key"]] == [*range(30, 40), *range(50, 60)]


def read_tars(folder: Path) -> list[dict[str, Any]]:
    """Read all samples with `webdataset`, which does not close the tars that it has read."""
    import webdataset as wds

    paths = sorted(str(path) for path in folder.glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(wds.WebDataset(paths, shardshuffle=False, empty_check=False))
        gc.collect()
    return samples


def test_webdataset_reads_the_tars(output: TaggedOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "SHARD_BYTES", 40_000)
    done = export_output(output, "webdataset", tmp_path / "tars", thumbnails=True)
    assert done.images == ROWS
    assert len(list((tmp_path / "tars").iterdir())) > 2
    rows = read_rows(output)
    thumbnails = dict(zip(rows, output.to_arrow(["thumbnail"])["thumbnail"].to_pylist(), strict=True))
    names = []
    for sample in read_tars(tmp_path / "tars"):
        names.append(sample["__key__"])
        assert {name for name in sample if not name.startswith("__")} == {"jpg", "json", "npy"}
        one = json.loads(sample["json"])
        wanted = rows.pop(one["id"])
        check(one, wanted)
        assert one["metadata"] == (None if wanted["metadata"] is None else json.loads(wanted["metadata"]))
        vector = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
        assert (vector.dtype, vector.shape) == (np.dtype(np.float32), (WIDTH,))
        assert np.array_equal(vector, wanted["vector"])
        assert sample["jpg"] == thumbnails[one["id"]]
        if "caption" in wanted:
            assert one["caption"] == wanted["caption"]
            assert one["number"] == wanted["number"]
            assert one["tags"] == wanted["tags"]
            assert one["weight"] in (0.1, None), "NaN and infinity have no JSON"
            assert datetime.fromisoformat(one["taken"]) == wanted["taken"]
            assert one["price"] == str(wanted["price"])
    assert not rows
    assert len({name.lower() for name in names}) == ROWS
    assert all(name.isascii() and "." not in name and "/" not in name for name in names)
    assert "photos_2024_05_a_b_c" in names


def test_scores_in_json_are_the_shortest_numbers_of_float32(plain: TaggedOutput, tmp_path: Path) -> None:
    export_output(plain, "coco", tmp_path / "coco.json")
    scores = [one["score"] for one in json.loads((tmp_path / "coco.json").read_text())["annotations"]]
    assert max(len(str(score)) for score in scores) <= 11
    wanted = np.concatenate([row["scores"] for row in read_rows(plain).values()])
    assert np.array_equal(np.asarray(scores, np.float32), wanted)


def test_the_same_output_gives_the_same_tars(output: TaggedOutput, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        export_output(output, "webdataset", tmp_path / name, thumbnails=True)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((tmp_path / name).iterdir())])
    assert digests[0] == digests[1]


def test_original_files_keep_their_bytes_and_format(plain: TaggedOutput, tmp_path: Path) -> None:
    write_images(tmp_path / "images", plain)
    export_output(plain, "webdataset", tmp_path / "tars", images=tmp_path / "images", where="key like 'plain/%'")
    found = list(read_tars(tmp_path / "tars"))
    assert len(found) == ROWS - len(KEYS)
    for sample in found:
        row = int(sample["__key__"].removeprefix("plain_"))
        assert sample["png"] == draw(row)


def test_tars_are_plain_enough_for_old_readers(output: TaggedOutput, tmp_path: Path) -> None:
    export_output(output, "webdataset", tmp_path / "tars", thumbnails=True)
    for path in (tmp_path / "tars").iterdir():
        with tarfile.open(path) as tar:
            for member in tar:
                assert len(member.name) <= 100
                assert (member.mtime, member.uid, member.pax_headers) == (0, 0, {})
