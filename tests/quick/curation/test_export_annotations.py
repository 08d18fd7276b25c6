"""Exports as annotations: COCO, XMP sidecars and FiftyOne."""

from __future__ import annotations

import base64
import io
import json
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyexiv2
import pytest
from pycocotools.coco import COCO

from curation.export.export import export_output
from curation.export.targets.xmp import make_packet
from curation.tagged_output import TaggedOutput
from tests.support.exports import KEYS, LABELS, ROWS, make_output, read_rows


@pytest.fixture(scope="module", params=["float32", "float16"])
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    half = request.param == "float16"
    return make_output(tmp_path_factory.mktemp("annotations") / "out", dtype=request.param, passed=half, bands=half)


def test_pycocotools_reads_the_annotations(output: TaggedOutput, tmp_path: Path, capsys: Any) -> None:
    done = export_output(output, "coco", tmp_path / "coco.json")
    assert (done.images, done.rejected) == (ROWS, 1)
    coco = COCO(str(tmp_path / "coco.json"))
    assert [one["name"] for one in coco.loadCats(coco.getCatIds())] == LABELS
    assert min([*coco.getCatIds(), *coco.getImgIds(), *coco.getAnnIds()]) == 1
    rows = read_rows(output)
    for image in coco.loadImgs(coco.getImgIds()):
        wanted = rows.pop(image["row_id"])
        assert (image["key"], image["width"], image["height"]) == (wanted["key"], 640, 480)
        found = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert [LABELS[one["category_id"] - 1] for one in found] == wanted["labels"]
        assert np.array_equal(np.asarray([one["score"] for one in found], np.float32), wanted["scores"])
        assert [one["band"] for one in found if "band" in one] == wanted.get("bands", [])
    assert not rows
    for number, name in enumerate(LABELS, 1):
        wanted_count = sum(name in row["labels"] for row in read_rows(output).values())
        assert len(coco.getImgIds(catIds=[number])) == wanted_count


def test_file_names_in_coco_are_the_keys_and_unique(output: TaggedOutput, tmp_path: Path) -> None:
    done = export_output(output, "coco", tmp_path / "coco.json")
    names = [one["file_name"] for one in json.loads((tmp_path / "coco.json").read_text())["images"]]
    assert len(set(names)) == ROWS
    keys = output.to_arrow(["key"])["key"].to_pylist()
    other = [key for key, name in zip(keys, names, strict=True) if key != name]
    assert other == ["same.jpg", "same.jpg"]
    assert done.notices == ("1 keys are those of several images: their file_name is the key with a suffix",)


def test_groups_are_supercategories(tmp_path: Path) -> None:
    export_output(make_output(tmp_path / "out"), "coco", tmp_path / "coco.json", where="row < 2")
    content = json.loads((tmp_path / "coco.json").read_text())
    found = {one["name"]: one["supercategory"] for one in content["categories"]}
    assert found == {name: "in|out" if "doors" in name else "" for name in LABELS}
    assert len(content["images"]) == 6


def test_exiv2_reads_the_sidecars(output: TaggedOutput, tmp_path: Path) -> None:
    done = export_output(output, "xmp", tmp_path / "xmp")
    assert done.images == ROWS
    files = [path for path in (tmp_path / "xmp").rglob("*") if path.is_file()]
    assert len(files) == ROWS
    groups = {name: group for group, members in output.labels.groups.items() for name in members}
    unnamed = []
    for row in read_rows(output).values():
        path = tmp_path / "xmp" / f"{row['key']}.xmp"
        if row["key"].startswith("/") or ".." in row["key"] or not exists(path):
            unnamed.append(row["key"])
            continue
        # Exiv2 opens the sidecar as a file of its own, and parses it with Adobe's XMP toolkit.
        with pyexiv2.ImageData(path.read_bytes()) as image:
            found = image.read_xmp()
        if row["key"] == "same.jpg":
            continue  # one of two
        assert found.get("Xmp.dc.subject", []) == row["labels"]
        wanted = [f"{groups[name].replace('|', '/')}|{name}" if name in groups else name for name in row["labels"]]
        wanted = [name.replace("a|b", "a/b") for name in wanted]
        assert found.get("Xmp.lr.hierarchicalSubject", []) == wanted
    assert sorted(unnamed) == sorted(
        key for key in KEYS if key.startswith(("/", "x/..", "trailing", "tab", "back", "long", "d/d/d"))
    )


def exists(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


@pytest.mark.parametrize("name", ["<b> & \"c\" 'd'", "]]>", "\x00\x08\ufffe x", "é 日本 🐈", " two  spaces ", "a|b"])
def test_labels_are_escaped_in_xmp(name: str) -> None:
    packet = make_packet([name], {name: "g|h"})
    namespaces = {"dc": "http://purl.org/dc/elements/1.1/", "lr": "http://ns.adobe.com/lightroom/1.0/"}
    tree = ElementTree.fromstring(packet)
    wanted = name.replace("\x00", "\ufffd").replace("\x08", "\ufffd").replace("\ufffe", "\ufffd")
    [subject] = tree.iterfind(".//dc:subject//*/*", namespaces)
    assert subject.text == wanted
    [levels] = tree.iterfind(".//lr:hierarchicalSubject//*/*", namespaces)
    assert levels.text == f"g/h|{wanted.replace('|', '/')}"


def test_sidecars_never_leave_their_folder(output: TaggedOutput, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    export_output(output, "xmp", tmp_path / "inside/xmp")
    export_output(output, "fiftyone", tmp_path / "inside/fo", thumbnails=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside"]
    assert sorted(path.name for path in (tmp_path / "inside").iterdir()) == ["fo", "xmp"]


def test_fiftyone_samples_have_the_rows(output: TaggedOutput, tmp_path: Path) -> None:
    """The layout itself. `tests/clients/test_fiftyone.py` reads it with FiftyOne."""
    export_output(output, "fiftyone", tmp_path / "fo", thumbnails=True)
    dataset = json.loads((tmp_path / "fo/metadata.json").read_text())
    fields = {field["name"]: field["ftype"].rpartition(".")[2] for field in dataset["sample_fields"]}
    assert dataset["classes"] == {"predictions": LABELS}
    samples = json.loads((tmp_path / "fo/samples.json").read_text())["samples"]
    thumbnails = dict(zip(read_rows(output), output.to_arrow(["thumbnail"])["thumbnail"].to_pylist(), strict=True))
    rows = read_rows(output)
    for sample in samples:
        wanted = rows.pop(sample["row_id"])
        assert {name for name in sample if not name.startswith("_")} <= set(fields)
        found = sample["predictions"]["classifications"]
        assert [one["label"] for one in found] == wanted["labels"]
        assert np.array_equal(np.asarray([one["confidence"] for one in found], np.float32), wanted["scores"])
        packed = zlib.decompress(base64.b64decode(sample["embedding"]["$binary"]["base64"]))
        assert np.array_equal(np.load(io.BytesIO(packed)), wanted["vector"])
        assert (tmp_path / "fo" / sample["filepath"]).read_bytes() == thumbnails[wanted["id"]]
        assert (sample["metadata"], sample["width"], sample["height"]) == (None, 640, 480), "thumbnails are smaller"
        assert sample["input_metadata"] == wanted["metadata"]
        if "caption" in wanted:
            assert (sample["caption"], sample["tags"], sample["input_tags"]) == (wanted["caption"], [], wanted["tags"])
            assert sample["input_filepath"] == "not a path"
            assert sample["price"] == str(wanted["price"])
            assert sample["box"] in (None, '{"x":0.5,"name":"n"}')
            assert [one["band"] for one in found] == wanted["bands"]
    assert not rows
    assert len({sample["filepath"] for sample in samples}) == len({sample["_id"]["$oid"] for sample in samples}) == ROWS
