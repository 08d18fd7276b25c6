"""A job over a dataset on the hub gives the same rows as over the same files on a disk."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sightline import open_output
from storage.store import join
from tests.support.jobs import Place, make_image
from tests.support.stores.hub_server import HubServer
from tests.support.tars import make_tar

REPO = "owner/pictures"
ROOT = f"hf://datasets/{REPO}"


def make_hub_parquet(images: list[dict[str, Any]]) -> bytes:
    """Return a file as `datasets` writes it: with features, of which two are images."""
    features = {"image": {"_type": "Image"}, "mask": {"_type": "Image"}, "label": {"_type": "Value", "dtype": "int64"}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.array(images, kind),
        "mask": pa.array([{"bytes": make_image(99), "path": None} for _ in images], kind),
        "label": pa.array(range(len(images))),
    }
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer, row_group_size=4)
    return buffer.getvalue()


def embed(first: int, count: int) -> list[dict[str, Any]]:
    """Return values of an image column that hold the images."""
    return [{"bytes": make_image(number), "path": f"{number}.jpg"} for number in range(first, first + count)]


FILES: dict[str, bytes] = {
    ".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n",
    "README.md": b"---\nlicense: mit\n---\n",
    "data/train-00000-of-00002.parquet": make_hub_parquet(embed(100, 10)),
    "data/train-00001-of-00002.parquet": make_hub_parquet(embed(110, 5)),
    # Not embedded: `bytes` is null, and the path is relative to the file's folder.
    "data/paths.parquet": make_hub_parquet(
        [{"bytes": None, "path": "../images/a #1 %20.png"}, {"bytes": None, "path": "/home/me/gone.jpg"}]
    ),
    "shards/000.tar": make_tar(
        part
        for number in range(6)
        for part in ((f"{number}.jpg", make_image(number)), (f"{number}.json", b'{"n": %d}' % number))
    ),
    "images/a #1 %20.png": make_image(20),
    "images/broken.jpg": b"\xff\xd8 no image",
}
LIST = b"path,caption\nimages/a #1 %20.png,first\nimages/none.jpg,second\n"


@pytest.fixture
def dataset(hub: HubServer, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub with a dataset of `FILES`."""
    hub.commit(REPO, FILES)
    hub.use(monkeypatch)
    yield hub
    del hub.datasets[REPO]


def comparable(place: Place, root: str) -> list[dict[str, Any]]:
    """Return all rows without what names the place or the time."""
    rows = [row for kind in ("data", "rejects") for row in place.rows(kind)]
    for row in rows:
        assert row["source"].startswith(f"{root}/") or row["key"] == "/home/me/gone.jpg"
        row["source"] = row["source"].removeprefix(f"{root}/")
        row["detail"] = row.get("detail", "").replace(root, "") if "detail" in row else None
        for name in [name for name in row if name in ("shard", "row", "id") or name.endswith("_at")]:
            del row[name]
    return sorted(rows, key=lambda row: (row["source"], str(row["key"])))


def tag(place: Place, root: str, **keys: Any) -> tuple[int, str]:
    """Run a job over a root. Return its exit code, and what it printed."""
    done = place.tag(input=root, **keys)
    return done.returncode, done.stdout + done.stderr


def test_rows_are_those_of_a_disk(dataset: HubServer, tmp_path: Path) -> None:
    here = tmp_path / "files"
    write_all(here, FILES)
    places = []
    for name, root in (("there", ROOT), ("here", str(here))):
        (tmp_path / name).mkdir()
        place = Place(str(tmp_path / name), tmp_path / name)
        code, said = tag(place, root, thumbnails=True)
        assert code == 0, said
        report = place.verify()
        assert (report.ok, report.problems, report.orphans) == (True, [], 0)
        # 10 and 5 of the Parquet files, 1 of paths, 6 of the tar, 1 loose; the file that is gone and the broken one.
        assert (report.rows_tagged, report.rows_rejected) == (23, 2)
        places.append(place)
    there, disk = comparable(places[0], ROOT), comparable(places[1], str(here))
    assert there == disk
    assert set(dataset.tokens) == {""}

    # The next night nothing is new, although the dataset's card is.
    place = places[0]
    dataset.commit(REPO, {"README.md": b"another card"})
    code, said = tag(place, ROOT, thumbnails=True)
    assert code == 0, said
    assert comparable(place, ROOT) == there

    # A commit with new files: only they are tagged.
    new = {"data/train-00002.parquet": make_hub_parquet(embed(200, 3)), "images/later.jpg": make_image(31)}
    dataset.clear()
    dataset.commit(REPO, new)
    code, said = tag(place, ROOT, thumbnails=True)
    assert code == 0, said
    read = {path.rpartition("/")[2] for method, path in dataset.requests if method == "GET" and "/resolve/" in path}
    assert read == {"train-00002.parquet", "later.jpg"}
    write_all(here, new)
    assert tag(places[1], str(here), thumbnails=True)[0] == 0
    assert comparable(place, ROOT) == comparable(places[1], str(here))
    assert len(open_output(place.output).to_arrow(["key"])) == 27

    # A commit that changes a file: it is named, and with `retag` its new version is tagged too.
    dataset.commit(REPO, {"data/train-00001-of-00002.parquet": make_hub_parquet(embed(300, 2))})
    code, said = tag(place, ROOT, thumbnails=True)
    assert code == 1
    assert "train-00001-of-00002.parquet" in said
    assert tag(place, ROOT, thumbnails=True, on_changed="retag")[0] == 0
    assert len(open_output(place.output).to_arrow(["key"])) == 29
    assert place.verify().ok


def write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files below a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_lists_on_the_hub_and_files_that_go_away(dataset: HubServer, tmp_path: Path) -> None:
    dataset.commit(REPO, {"list.csv": LIST})
    place = Place(str(tmp_path), tmp_path)
    code, said = tag(place, f"{ROOT}/list.csv")
    assert code == 0, said
    (row,) = place.rows("data")
    assert (row["source"], row["key"]) == (f"{ROOT}/images/a #1 %20.png", "images/a #1 %20.png")
    assert json.loads(row["metadata"]) == {"caption": "first"}
    (reject,) = place.rows("rejects")
    assert (reject["source"], reject["reason"]) == (f"{ROOT}/images/none.jpg", "missing")
    # A file that goes away after it was planned waits, or is rejected.
    dataset.commit(REPO, {"images/b.jpg": make_image(40), "images/c.jpg": make_image(41)}, "pruned")
    inputs = f"{ROOT}@pruned/images"
    place.output = join(str(tmp_path), "pruned")
    place.plan(input=inputs)
    dataset.commit(REPO, {"images/c.jpg": None}, "pruned")
    code, said = tag(place, inputs)
    assert code == 1
    assert "images/c.jpg" in said
    assert tag(place, inputs, on_missing="reject")[0] == 0
    assert place.keys_of("data") == {"b.jpg": 1}
    assert [(row["key"], row["reason"]) for row in place.rows("rejects")] == [("c.jpg", "missing")]


@pytest.mark.parametrize(
    ("root", "says"),
    [
        ("hf://datasets/owner/none", "there is no dataset owner/none, or it is private"),
        (f"{ROOT}@none", "no such revision"),
        (f"{ROOT}/none", "nothing"),
        ("hf://owner/pictures", "write hf://datasets/owner/pictures"),
    ],
)
def test_wrong_inputs_are_refused(dataset: HubServer, tmp_path: Path, root: str, says: str) -> None:
    place = Place(str(tmp_path), tmp_path)
    code, said = tag(place, root)
    assert (code, says in " ".join(said.split())) == (2, True), said
