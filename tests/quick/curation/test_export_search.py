"""Exports to vector databases, read back and searched with their own clients."""

from __future__ import annotations

import json
import sys
import uuid
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from qdrant_client import QdrantClient
from qdrant_client.models import FieldCondition, Filter, MatchValue

from curation.export.export import export_output
from curation.export.targets import lancedb as lance_target
from curation.export.targets import qdrant as qdrant_target
from curation.tagged_output import TaggedOutput, open_output
from storage.settings import ConfigError
from storage.store import StoreError
from tests.support.exports import ROWS, WIDTH, make_output, read_rows
from tests.support.qdrant_server import QdrantServer


@pytest.fixture(scope="module", params=["float32", "float16"])
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    half = request.param == "float16"
    return make_output(
        tmp_path_factory.mktemp("search") / "out", dtype=request.param, passed=half, bands=half, thumbnails=half
    )


def test_lancedb_has_all_rows_and_finds_the_nearest(
    output: TaggedOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lance_target, "_ROWS", 7)
    done = export_output(output, "lancedb", tmp_path / "db")
    assert (done.images, done.rejected) == (ROWS, 1)
    table = lancedb.connect(tmp_path / "db").open_table("images")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), WIDTH)
    rows = read_rows(output)
    for one in table.to_arrow().to_pylist():
        wanted = rows.pop(one["id"])
        assert (one["key"], one["labels"]) == (wanted["key"], wanted["labels"])
        assert np.array_equal(np.asarray(one["scores"], np.float32), wanted["scores"])
        assert np.array_equal(np.asarray(one["embedding"], np.float32), wanted["vector"])
        for name in ("metadata", "caption", "number", "tags", "box", "taken", "price", "raw", "bands"):
            if name in wanted:
                assert one[name] == wanted[name]
    assert not rows
    for row, wanted in list(read_rows(output).items())[::9]:
        query = table.search(wanted["vector"])
        assert isinstance(query, lancedb.query.LanceVectorQueryBuilder)
        [found] = query.distance_type("cosine").limit(1).to_list()
        assert found["id"] == row
        assert found["_distance"] == pytest.approx(0, abs=1e-5)
    sql = "array_has(labels, 'cat & <dog>') AND width = 640"
    wanted_count = sum("cat & <dog>" in row["labels"] for row in read_rows(output).values())
    assert table.count_rows(sql) == wanted_count > 0


def test_lancedb_keeps_images_beside_the_vectors(tmp_path: Path) -> None:
    output = make_output(tmp_path / "out")
    export_output(output, "lancedb", tmp_path / "db", thumbnails=True, where="len(labels) > 1")
    table = lancedb.connect(tmp_path / "db").open_table("images").to_arrow()
    thumbnails = dict(zip(read_rows(output), output.to_arrow(["thumbnail"])["thumbnail"].to_pylist(), strict=True))
    assert 0 < table.num_rows < ROWS
    assert table["image"].to_pylist() == [thumbnails[row] for row in table["id"].to_pylist()]


def read_int(text: str) -> float:
    """A number of JSON as Qdrant holds it: integers of more than 64 bits become doubles."""
    return int(text) if int(text) < 2**64 else float(text)


def check_points(client: QdrantClient, name: str, output: TaggedOutput) -> None:
    points, _ = client.scroll(name, limit=10 * ROWS, with_vectors=True)
    rows = read_rows(output)
    assert len(points) == len(rows)
    for point in points:
        payload = point.payload
        assert payload is not None
        wanted = rows.pop(payload["id"])
        assert str(point.id) == qdrant_target.make_id(payload["id"])
        assert uuid.UUID(str(point.id)).version == 5
        assert (payload["key"], payload["labels"]) == (wanted["key"], wanted["labels"])
        assert np.array_equal(np.asarray(payload["scores"], np.float32), wanted["scores"])
        assert payload["metadata"] == (
            None if wanted["metadata"] is None else json.loads(wanted["metadata"], parse_int=read_int)
        )
        assert np.allclose(np.asarray(point.vector, np.float32), wanted["vector"], atol=1e-6)
        if "caption" in wanted:
            assert (payload["caption"], payload["number"]) == (wanted["caption"], wanted["number"])
    assert not rows


def test_qdrant_has_all_rows_and_finds_the_nearest(output: TaggedOutput, tmp_path: Path) -> None:
    done = export_output(output, "qdrant", tmp_path / "q")
    assert done.images == ROWS
    client = QdrantClient(path=str(tmp_path / "q"))
    check_points(client, "images", output)
    for wanted in list(read_rows(output).values())[::9]:
        [found] = client.query_points("images", query=wanted["vector"].tolist(), limit=1).points
        assert found.payload is not None
        assert found.payload["id"] == wanted["id"]
        assert found.score == pytest.approx(1, abs=1e-5)
    has = Filter(must=[FieldCondition(key="labels", match=MatchValue(value="日本 🐈"))])
    wanted_count = sum("日本 🐈" in row["labels"] for row in read_rows(output).values())
    assert client.count("images", count_filter=has).count == wanted_count > 0
    client.close()


def test_a_second_upload_to_a_server_changes_nothing(output: TaggedOutput, tmp_path: Path) -> None:
    with QdrantServer() as server:
        for _ in range(2):
            done = export_output(output, "qdrant", f"{server.url}/pictures")
            assert done.destination == f"{server.url}/pictures"
            check_points(server.client, "pictures", output)
        # A part of the rows, later: points that are there stay.
        export_output(output, "qdrant", f"{server.url}/pictures", where="row < 3")
        check_points(server.client, "pictures", output)


def test_requests_to_a_server_are_bounded_in_bytes(
    output: TaggedOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qdrant_target, "_REQUEST_BYTES", 9000)
    with QdrantServer() as server:
        export_output(output, "qdrant", f"{server.url}/pictures")
        assert len(server.bodies) > 3
        assert max(server.bodies) <= 9000
        check_points(server.client, "pictures", output)


def test_an_upload_that_breaks_off_is_finished_by_the_next(
    output: TaggedOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qdrant_target, "_REQUEST_BYTES", 9000)
    with QdrantServer() as server:
        server.most = 2
        with pytest.raises(StoreError, match="503"):
            export_output(output, "qdrant", f"{server.url}/pictures")
        assert 0 < server.client.count("pictures").count < ROWS
        server.most = 1000
        export_output(output, "qdrant", f"{server.url}/pictures")
        check_points(server.client, "pictures", output)


@pytest.mark.parametrize("to", ["lancedb", "qdrant"])
def test_a_library_that_is_not_installed_is_named(
    output: TaggedOutput, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, {"lancedb": "lancedb", "qdrant": "qdrant_client"}[to], None)
    with pytest.raises(ConfigError, match=rf"pip install 'sightline\[{to}\]'$"):
        export_output(output, to, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_points_of_another_output_or_another_size_are_never_replaced(output: TaggedOutput, tmp_path: Path) -> None:
    other = make_output(tmp_path / "other")
    with QdrantServer() as server:
        export_output(output, "qdrant", f"{server.url}/pictures")
        with pytest.raises(ConfigError, match="has points of something else than"):
            export_output(other, "qdrant", f"{server.url}/pictures")
        check_points(server.client, "pictures", output)
        with pytest.raises(ConfigError, match="write a server and a collection"):
            export_output(other, "qdrant", server.url)
        url = server.url
    with pytest.raises(StoreError, match=r"http://127\.0\.0\.1"):
        export_output(other, "qdrant", f"{url}/pictures")


def test_ids_of_points_do_not_depend_on_where_the_output_is(tmp_path: Path) -> None:
    one = make_output(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    two = open_output(str(tmp_path / "two"))
    assert list(read_rows(two)) == [row["id"] for row in read_rows(two).values()]
    assert one.uri != two.uri
    assert qdrant_target.make_id("000000-000000/0") == "543b8cb0-2734-58c8-81fb-200b86fdcd87"
