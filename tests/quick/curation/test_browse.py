"""The page finds what `sightline search` finds, follows an output that grows, and hands on what is selected."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from benchmarks.outputs import SCALE, SyntheticOutput, write_output
from curation.browse import copy as copy_module
from curation.browse import results as results_module
from curation.browse.app import make_app
from curation.browse.copy import LocalCopy
from curation.browse.follow import Follower
from curation.browse.query import BrowseQuery, Embedder
from curation.browse.results import BINS, Result, Searcher, describe_rows
from curation.browse.snapshot import Snapshot
from curation.quality.truth_files import read_truth_file
from curation.search.query import Query
from curation.search.search import search_output
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from siglip.labels import LabelSet
from siglip.scoring import Floats
from storage.settings import ConfigError
from storage.store import StoreError
from tests.support.growing_output import GrowingOutput
from tests.support.vectors import draw_vectors

NAMES = ["cat", "dog", "bird", "tree", "a/b 'c' <d>"]
WIDTH, SHARDS = 16, (150, 1, 0, 260, 90)
TEXTS = draw_vectors(len(NAMES), WIDTH, 1)
ROWS = sum(SHARDS)


def embed(shard: int) -> Floats:
    """Embeddings, a tenth of which are close to one of the texts, and a tenth close to the row before."""
    vectors = draw_vectors(SHARDS[shard], WIDTH, 10 + shard)
    for row in range(len(vectors)):
        if row % 10 == 3:
            vectors[row] = TEXTS[row // 10 % len(TEXTS)] * 0.25 + vectors[row]
        if row % 10 == 7:
            vectors[row] = vectors[row - 1] + 0.05 * vectors[row]
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@pytest.fixture(scope="module", params=["float32", "float16"])
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    root = str(tmp_path_factory.mktemp("browse") / "made")
    labels = LabelSet.model_validate({"names": NAMES, "threshold": 1e-4, "top_k": 2})
    made = SyntheticOutput(
        labels, TEXTS, len(SHARDS), embed, dtype=request.param, thumbnail=lambda row: b"jpeg %d" % row,
        reject=lambda shard: ["truncated", "too_many_pixels"][: shard % 3],
    )  # fmt: skip
    write_output(root, made)
    return open_output(root)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_module, "ROWS", 64)


@pytest.fixture
def snapshot(output: TaggedOutput, tmp_path: Path) -> Snapshot:
    return copy_of(output, tmp_path)


def copy_of(output: TaggedOutput, folder: Path) -> Snapshot:
    found: list[Snapshot] = []
    LocalCopy(folder).update(output, found.append)
    return found[-1]


def search(snapshot: Snapshot, **asked: Any) -> Result:
    return Searcher(Embedder(None)).search(BrowseQuery.model_validate(asked), snapshot)[0]


def ids(result: Result) -> list[str]:
    found: list[str] = result.snapshot.take(result.all_positions(), ["id"])["id"].to_pylist()
    return found


def test_a_copy_has_the_rows_of_the_output_however_small_its_shards_are(
    output: TaggedOutput, snapshot: Snapshot
) -> None:
    columns = ["id", *output.columns]
    assert snapshot.take(np.arange(ROWS), columns).equals(output.to_arrow(columns))
    assert [len(batch) for batch in snapshot.batches] == [64] * 7 + [53]
    assert snapshot.take([500, 3, 3], ["key"]).equals(output.take([500, 3, 3], ["key"]))
    assert snapshot.thumbnail(417) == b"jpeg 417"
    assert snapshot.rejects.num_rows == output.rejected > 0
    given = output.to_arrow(["labels"])["labels"].to_pylist()
    for name in NAMES:
        assert snapshot.find(name).tolist() == [name in labels for labels in given]
    counts, without = snapshot.count_labels(snapshot.live)
    assert counts.tolist() == [sum(name in labels for labels in given) for name in NAMES]
    assert without == sum(not labels for labels in given)


@pytest.mark.parametrize(
    ("asked", "query"),
    [
        ({"texts": ["cat"]}, Query(["cat"])),
        ({"texts": ["cat"], "cutoff": "none"}, Query(["cat"], cutoff="none")),
        ({"texts": ["cat", "dog"], "cutoff": "none"}, Query(["cat", "dog"], cutoff="none")),
        ({"texts": ["dog"], "without": ["bird"], "cutoff": "none"}, Query(["dog"], ["bird"], cutoff="none")),
        ({"like": [7, 200]}, Query(like=["image 00000007", "image 00000200"])),
        ({"like": [7], "texts": ["tree"]}, Query(["tree"], like=["image 00000007"])),
        ({"like": [7], "without": ["cat"]}, Query(without=["cat"], like=["image 00000007"])),
        (
            {"texts": ["cat"], "where": "key < 'image 00000300'", "labels": [{"label": "cat"}], "cutoff": "none"},
            Query(["cat"], where="key < 'image 00000300'", labels=["cat"], cutoff="none"),
        ),
        ({"texts": [NAMES[4]], "where": "id like '%/1%'"}, Query([NAMES[4]], where="id like '%/1%'")),
    ],
)
def test_the_page_finds_what_the_command_finds_in_its_order(
    output: TaggedOutput,
    snapshot: Snapshot,
    asked: dict[str, Any],
    query: Query,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(results_module, "FIRST", 40)  # the rest is put in order later
    expected = search_output(output, Query(**{**query.__dict__, "top": ROWS}))
    found = search(snapshot, **asked)
    assert describe_rows(found, 0, 30) == describe_rows(search(snapshot, **asked), 0, 30)
    assert ids(found) == expected.table["id"].to_pylist()
    assert found.count == expected.table.num_rows
    assert (found.found.searched, found.found.left_out) == (expected.searched, expected.left_out)
    assert (found.found.cutoff, found.found.best) == (expected.cutoff, expected.best)
    rows = describe_rows(found, 0, ROWS)
    for name in ("score", "similarity"):
        assert [row[name] for row in rows] == expected.table[name].to_pylist()
    given = expected.table["labels"].to_pylist()
    assert found.found.label_counts.tolist() == [sum(name in labels for labels in given) for name in NAMES]


def test_labels_by_score_and_their_histograms(output: TaggedOutput, snapshot: Snapshot) -> None:
    scores = np.concatenate(list(output.scores()))
    all_ids = np.asarray(output.to_arrow(["id"])["id"].to_pylist())
    least = float(np.quantile(scores[:, 0], 0.9))
    found = search(snapshot, labels=[{"label": "cat", "min": least}, {"label": "dog", "min": 0}])
    places = np.flatnonzero(scores[:, 0] >= np.float32(least))
    assert ids(found) == all_ids[places[np.argsort(-scores[places, 0], kind="stable")]].tolist()
    assert sum(found.found.histograms["cat"]) == ROWS
    assert sum(found.found.histograms["dog"]) == len(places)
    expected = np.histogram(scores[:, 0], BINS, (0, 1))[0]
    assert found.found.histograms["cat"] == expected.tolist()


def test_without_a_query_the_images_are_in_the_order_of_the_output(output: TaggedOutput, snapshot: Snapshot) -> None:
    everything = output.to_arrow(["id", "labels"]).to_pylist()
    assert ids(search(snapshot)) == [row["id"] for row in everything]
    assert ids(search(snapshot, order="last")) == [row["id"] for row in everything][::-1]
    assert ids(search(snapshot, unlabelled=True)) == [row["id"] for row in everything if not row["labels"]]
    assert set(ids(search(snapshot, texts=["cat"], order="first"))) == set(ids(search(snapshot, texts=["cat"])))
    wanted = {row["id"] for row in everything} - set(ids(search(snapshot, texts=["cat"])))
    assert set(ids(search(snapshot, without=["cat"]))) == wanted  # a page can ask only what is unwanted


def test_folded_images_are_counted_and_lose_none(output: TaggedOutput, snapshot: Snapshot) -> None:
    found = search(snapshot, like=[6], fold=True)
    rows = describe_rows(found, 0, ROWS)
    assert len(rows) == found.count < len(found.found.positions) == ROWS - 1
    assert sum(row["copies"] for row in rows) + found.count == ROWS - 1
    embeddings = read_embeddings(snapshot.take(found.all_positions(), ["embedding"]))
    assert (np.tril(embeddings @ embeddings.T, -1) < 0.97).all()


def test_folding_is_among_the_first_and_the_rest_follows(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_module, "FIRST", 100)
    found, plain = search(snapshot, like=[6], fold=True), search(snapshot, like=[6])
    assert found.count == len(found.all_positions()) < plain.count
    assert found.all_positions()[-300:].tolist() == plain.all_positions()[-300:].tolist()
    assert len({*found.all_positions().tolist()}) == found.count


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"texts": ["cat"], "without": ["cat"]}, "both wanted and unwanted"),
        ({"labels": [{"label": "nobody"}]}, "no label 'nobody'"),
        ({"where": "nothing > 1"}, "nothing"),
        ({"where": "count(*) > 1"}, "aggregate"),
        ({"like": [ROWS]}, "no such image"),
        ({"like": [-1]}, "no such image"),
        ({"images": ["0" * 32]}, "no longer known"),
        ({"texts": ["a unicorn"]}, "--model"),  # the made-up model is nowhere
    ],
)
def test_what_cannot_be_asked_is_refused(snapshot: Snapshot, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        search(snapshot, **asked)
    assert "\n" not in str(refused.value)


def follow(output: TaggedOutput, folder: Path) -> Follower:
    folder.mkdir(exist_ok=True)
    return Follower(output, folder, seconds=0.05, tell=lambda line: None)


def test_positions_stay_while_an_output_grows_and_changes(tmp_path: Path) -> None:
    growing = GrowingOutput(tmp_path / "made")
    growing.grow(3, 70, rejected={5, 6})
    copy, found = LocalCopy(tmp_path), list[Snapshot]()
    copy.update(open_output(str(growing.root)), found.append)
    first = found[-1]
    growing.grow(2, 50)
    growing.retry(still={6})
    copy.update(output := open_output(str(growing.root)), found.append)
    last = found[-1]
    assert first.rows == 3 * 68
    assert first.live.all()  # what was shown before stays as it was
    assert last.rows == 3 * 68 + 2 * 50 + 3 * 69
    assert int(last.live.sum()) == output.rows == 2 * 50 + 3 * 69
    columns = ["id", "key", "embedding"]
    assert last.take(np.arange(first.rows), columns).equals(first.take(np.arange(first.rows), columns))
    shown = last.take(np.flatnonzero(last.live), columns).sort_by("id")
    assert shown.equals(output.to_arrow(columns).sort_by("id"))
    assert search(last).count == output.rows
    assert last.rejects.num_rows == 3


def test_a_copy_that_failed_in_the_middle_has_no_row_twice(
    output: TaggedOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, found = LocalCopy(tmp_path), list[Snapshot]()
    read, calls = TaggedOutput.shard_batches, []

    def fail(self: TaggedOutput, *arguments: Any) -> Iterator[Any]:
        for number, batch in enumerate(read(self, *arguments)):
            if number == 4:
                calls.append(number)
                raise StoreError("away")
            yield batch

    monkeypatch.setattr(TaggedOutput, "shard_batches", fail)
    with pytest.raises(StoreError):
        copy.update(output, found.append)
    assert found
    assert found[-1].live.any()
    monkeypatch.setattr(TaggedOutput, "shard_batches", read)
    copy.update(output, found.append)
    live = np.flatnonzero(found[-1].live)
    assert sorted(found[-1].take(live, ["id"])["id"].to_pylist()) == sorted(output.to_arrow(["id"])["id"].to_pylist())


def test_an_output_without_room_for_its_copy_is_refused(
    output: TaggedOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_module, "_SPARE_BYTES", 2**60)
    with pytest.raises(ConfigError, match="--copy-to"), closing(follow(output, tmp_path / "copy")) as follower:
        follower.start()


@pytest.fixture
def client(output: TaggedOutput, tmp_path: Path) -> Iterator[TestClient]:
    with closing(follow(output, tmp_path / "copy")) as follower:
        follower.start()
        while follower.state.complete is None:
            time.sleep(0.01)
        app = make_app(follower, Embedder(None), tmp_path / "answers.jsonl")
        with TestClient(app, base_url="http://127.0.0.1:1") as client:
            client.run = client.get("/api/about").json()["run"]  # type: ignore[attr-defined]
            yield client


def post(client: TestClient, name: str, body: Any, **headers: str) -> Any:
    return client.post(f"/api/{name}/{client.run}", json=body, headers=headers)  # type: ignore[attr-defined]


def test_the_api_sends_what_was_found_in_parts(client: TestClient, output: TaggedOutput) -> None:
    run = client.run  # type: ignore[attr-defined]
    found = post(client, "search", {"like": [7]}).json()
    assert found["count"] == ROWS - 1
    rows = client.get(f"/api/rows/{run}/{found['result']}?start=60&stop=120").json()
    positions = np.frombuffer(client.get(f"/api/positions/{run}/{found['result']}").content, "<i4")
    assert [row["position"] for row in [*found["rows"], *rows]] == positions[:120].tolist()
    assert client.get(f"/api/thumbnail/{run}/33").content == b"jpeg 33"
    about = client.get(f"/api/image/{run}/33").json()
    assert about["values"]["key"] == "image 00000033"
    assert "embedding" not in about["values"]
    assert {one["label"] for one in about["scores"]} == set(NAMES)
    rejects = client.get(f"/api/rejects/{run}?reason=truncated").json()
    assert rejects["count"] == len(rejects["rows"]) == client.get("/api/about").json()["rejected"]["truncated"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/rows/{run}/99?start=0&stop=60", 409),
        ("GET", "/api/rows/other/1?start=0&stop=60", 410),
        ("GET", "/api/rows/{run}/1?start=0&stop=100000", 422),
        ("GET", "/api/rows/{run}/1?start=-1&stop=1", 422),
        ("GET", "/api/thumbnail/{run}/-1", 404),
        ("GET", f"/api/thumbnail/{{run}}/{ROWS}", 404),
        ("GET", f"/api/image/{{run}}/{ROWS}", 404),
        ("GET", "/../../etc/passwd", 404),
    ],
)
def test_requests_for_what_there_is_not(client: TestClient, method: str, path: str, status: int) -> None:
    post(client, "search", {})
    response = client.request(method, path.format(run=client.run))  # type: ignore[attr-defined]
    assert response.status_code == status


def test_other_sites_are_refused(client: TestClient) -> None:
    assert post(client, "search", {}, origin="http://evil.example").status_code == 403
    assert client.get("/api/about", headers={"host": "evil.example"}).status_code == 400
    assert post(client, "search", {}, origin="http://127.0.0.1:1").status_code == 200


@pytest.mark.parametrize(
    "body", [{"text": ["cat"]}, {"texts": "cat"}, {"labels": [{"label": "cat", "min": 2}]}, {"texts": [""]}]
)
def test_a_query_with_unknown_or_wrong_fields_is_refused(client: TestClient, body: dict[str, Any]) -> None:
    response = post(client, "search", body)
    assert response.status_code == 422
    assert isinstance(response.json()["detail"], str)


def test_answers_are_read_by_the_commands_and_can_be_taken_back(client: TestClient, tmp_path: Path) -> None:
    said = post(client, "answers", {"positions": [3, 13, 300], "label": NAMES[4], "answer": "right"}).json()
    assert said["saved"] == 3
    post(client, "answers", {"positions": [13], "label": NAMES[4], "answer": "taken back"})
    read = read_truth_file(tmp_path / "answers.jsonl")
    assert [(row.label, row.answer) for row in read.rows] == [(NAMES[4], "right")] * 2
    unknown = post(client, "answers", {"positions": [3], "label": "unicorn", "answer": "right"})
    assert unknown.status_code == 422
    assert "retag" in unknown.json()["detail"]


def test_a_list_and_an_export_of_the_selection(client: TestClient, output: TaggedOutput, tmp_path: Path) -> None:
    expected = output.take([300, 3], ["id"])["id"].to_pylist()
    assert post(client, "list", {"positions": [300, 3]}).text.splitlines() == expected
    body = {"positions": [300, 3], "target": "hf", "destination": str(tmp_path / "out")}
    assert post(client, "export", body).status_code == 200
    while (said := client.get("/api/export").json())["state"] == "running":
        pass
    assert said["state"] == "done", said
    rows = [row for path in (tmp_path / "out").rglob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert {row["id"] for row in rows} == set(expected)
    refused = post(client, "export", {**body, "destination": " "})
    assert refused.status_code == 422
    post(client, "export", body)  # the folder is not empty now
    while (said := client.get("/api/export").json())["state"] == "running":
        pass
    assert said["state"] == "failed"
    assert "out" in json.dumps(said["lines"])


def test_scores_are_those_of_a_label_in_a_group(tmp_path: Path) -> None:
    labels = LabelSet.model_validate({"names": NAMES, "threshold": 0.01, "groups": {"animal": NAMES[:3]}})
    write_output(str(tmp_path / "made"), SyntheticOutput(labels, TEXTS, len(SHARDS), embed, scale=SCALE))
    output = open_output(str(tmp_path / "made"))
    scores = np.concatenate(list(output.scores()))[:, NAMES.index("dog")]
    found = search(copy_of(output, tmp_path), labels=[{"label": "dog", "min": 0.6}])
    assert found.count == int((scores >= np.float32(0.6)).sum()) > 0
