"""`POST /v1/search`: its results are those of the command line, and what it cannot do is refused by name."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

from curation.index import search as index_search
from curation.index.build import build_index
from serve.admission.auth import new_key
from serve.search import output as output_module
from serve.search.output import read_output
from sightline.cli import app
from sightline.commands.serving import prepare_endpoint
from storage.settings import ConfigError
from tests.support.endpoint import Endpoint, data_uri, make_config, run_endpoint, shape_png
from tests.support.searched_output import SHOWN, draw, make_shapes, write_shapes

RED = "red circle"
ROWS = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an output in `exact`, and one with an index in `index`."""
    folder = tmp_path_factory.mktemp("searched")
    write_shapes(folder / "exact")
    build_index(write_shapes(folder / "index"))
    return folder


@pytest.fixture(scope="module", params=["exact", "index"])
def endpoint(request: pytest.FixtureRequest, folder: Path) -> Iterator[Endpoint]:
    """An endpoint that holds all embeddings in memory, and one that uses an index."""
    with run_endpoint(make_config(search={"output": str(folder / request.param)})) as running:
        yield running


def found(endpoint: Endpoint, **body: Any) -> dict[str, Any]:
    """The response to a search, which must succeed."""
    response = endpoint.post("/v1/search", body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refused(endpoint: Endpoint, body: Any, code: str = "invalid_request", status: int = 400) -> str:
    """The field that a refusal names."""
    response = endpoint.post("/v1/search", body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), response.text
    return str(error["param"])


def keys(answer: dict[str, Any]) -> list[str]:
    return [row["key"] for row in answer["data"]]


def uri_of(endpoint: Endpoint) -> str:
    assert endpoint.service.search is not None
    return endpoint.service.search.opened.output.uri


def has_index(endpoint: Endpoint) -> bool:
    assert endpoint.service.search is not None
    return endpoint.service.search.opened.index is not None


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ({"text": RED}, ["--text", RED]),
        ({"text": "a disc", "cutoff": "none", "top": 7}, ["--text", "a disc", "--cutoff", "none", "--top", "7"]),
        ({"text": "unicorn"}, ["--text", "unicorn"]),
        ({"text": "red", "not": [RED], "cutoff": "none"}, ["--text", "red", "--not", RED, "--cutoff", "none"]),
        ({"text": "red", "labels": [RED]}, ["--text", "red", "--label", RED]),
        ({"like": f"{RED}/000000", "fold": True}, ["--like", f"{RED}/000000", "--fold"]),
        ({"like": "000000-000001/3"}, ["--like", "000000-000001/3"]),
        ({"text": RED, "fold": True, "cutoff": "none"}, ["--text", RED, "--fold", "--cutoff", "none"]),
    ],
)  # fmt: skip
def test_the_results_are_those_of_the_command_line(
    endpoint: Endpoint, body: dict[str, Any], arguments: list[str], tmp_path: Path
) -> None:
    target = tmp_path / "found.jsonl"
    given = ["search", uri_of(endpoint), *arguments, "--to", str(target), *(["--index"] if has_index(endpoint) else [])]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    answer = found(endpoint, **body)
    assert [row["id"] for row in answer["data"]] == [row["id"] for row in rows]
    assert (len(rows) > 0) == (body.get("text") != "unicorn")
    for mine, its in zip(answer["data"], rows, strict=True):
        assert mine["score"] == (None if its["score"] is None else pytest.approx(its["score"], rel=1e-5))
        assert mine["similarity"] == (None if its["similarity"] is None else pytest.approx(its["similarity"], rel=1e-5))
        for name in ("key", "source", "width", "height", "copies"):
            assert mine[name] == its[name]
        assert [(one["label"], one["score"]) for one in mine["labels"]] == list(
            zip(its["labels"], its["scores"], strict=True)
        )


def test_an_example_image_finds_images_like_it(endpoint: Endpoint) -> None:
    for image in (data_uri(shape_png(RED)), base64.b64encode(shape_png(RED)).decode()):
        answer = found(endpoint, image=image, top=5)
        assert all(key.startswith(f"{RED}/") for key in keys(answer))
        assert answer["usage"]["images"] == 1
        assert (answer["relevant"], answer["cutoff"], answer["best"]) == (None, None, None)
        assert all(row["score"] is None and row["similarity"] > 0.9 for row in answer["data"])


def test_as_many_results_as_asked_for_are_there_in_order(endpoint: Endpoint) -> None:
    for top in (1, 41, 239, 1000):
        answer = found(endpoint, text=RED, cutoff="none", top=top)
        scores = [row["score"] for row in answer["data"]]
        assert len(scores) == min(top, ROWS)
        assert scores == sorted(scores, reverse=True)
        assert len({row["id"] for row in answer["data"]}) == len(scores)
    assert (answer["rows"], answer["searched"]) == (ROWS, ROWS)


def test_nothing_is_found_where_nothing_is(endpoint: Endpoint) -> None:
    answer = found(endpoint, text="orange heart")
    assert (answer["data"], answer["relevant"]) == ([], 0)
    assert answer["best"] < answer["cutoff"]
    assert found(endpoint, text="orange heart", cutoff="none")["data"]


def test_labels_never_leave_fewer_results_than_there_are(endpoint: Endpoint) -> None:
    """Searched among the other images: a filter of the results would leave none."""
    answer = found(endpoint, text=RED, labels=["blue star"], cutoff="none")
    assert answer["searched"] == 12
    assert all("blue star" in [one["label"] for one in row["labels"]] for row in answer["data"])
    assert len(answer["data"]) == 12
    both = found(endpoint, text=RED, labels=["blue star", RED], cutoff="none")
    assert (both["data"], both["searched"]) == ([], 0)
    assert found(endpoint, text=RED, labels=["blue star", RED])["best"] is None


def test_unwanted_images_are_left_out(endpoint: Endpoint) -> None:
    answer = found(endpoint, text="red", cutoff="none", top=1000)
    without = found(endpoint, text="red", cutoff="none", top=1000, **{"not": [RED]})
    assert answer["left_out"] == 0
    assert without["left_out"] == 12
    assert len(without["data"]) == ROWS - 12
    assert not [key for key in keys(without) if key.startswith(f"{RED}/")]


def test_thumbnails_are_sent_until_they_are_too_many_bytes(folder: Path, endpoint: Endpoint) -> None:
    answer = found(endpoint, text=RED, thumbnails=True, top=6)
    for row in answer["data"]:
        kind, _, data = row["thumbnail"].partition(",")
        assert kind == "data:image/jpeg;base64"
        number = int(row["key"].partition("/")[2])
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == draw(number).size
    assert "thumbnail" not in found(endpoint, text=RED)["data"][0]
    with run_endpoint(make_config(search={"output": uri_of(endpoint), "thumbnail_bytes": 3000})) as small:
        some = [row["thumbnail"] for row in found(small, text=RED, thumbnails=True, top=6)["data"]]
        assert 0 < sum(one is not None for one in some) < 6
        assert sum(len(base64.b64decode(one.partition(",")[2])) for one in some if one) <= 3000


def test_what_cannot_be_done_is_refused_with_its_field(endpoint: Endpoint) -> None:
    image = data_uri(shape_png())
    cases: list[tuple[Any, str]] = [
        ({}, "text"),
        ({"labels": [RED]}, "text"),
        ({"not": [RED]}, "text"),
        ({"text": []}, "text"),
        ({"text": ""}, "text"),
        ({"text": ["a", 1]}, "text.1"),
        ({"text": "   "}, "text"),
        ({"text": "a", "not": [""]}, "not"),
        ({"text": "a", "not": ["a"]}, "not"),
        ({"text": "a", "not": "b"}, "not"),
        ({"text": "a", "where": "true"}, "where"),
        ({"text": "a", "offset": 20}, "offset"),
        ({"text": "a", "top_k": 3}, "top_k"),
        ({"text": "a", "top": 0}, "top"),
        ({"text": "a", "top": 1001}, "top"),
        ({"text": "a", "top": 2**64}, "top"),
        ({"text": "a", "top": True}, "top"),
        ({"text": "a", "top": 101, "thumbnails": True}, "top"),
        ({"text": "a", "cutoff": 0.5}, "cutoff"),
        ({"text": "a", "labels": ["no such label"]}, "labels"),
        ({"text": "a", "labels": []}, "labels"),
        ({"text": "a", "fold": "perhaps"}, "fold"),
        ({"like": "no such key"}, "like"),
        ({"like": "999999-999999/0"}, "like"),
        ({"like": "' OR true --"}, "like"),
    ]
    assert [(body, refused(endpoint, body)) for body, _ in cases] == cases
    assert refused(endpoint, {"text": image}, "unsupported_input") == "text"
    assert refused(endpoint, {"text": "a", "not": [image]}, "unsupported_input") == "not"
    assert refused(endpoint, {"image": "words"}, "invalid_image") == "image"
    assert refused(endpoint, {"text": "x" * 300}, "label_too_long") == "text"
    assert refused(endpoint, {"text": "a", "not": ["x" * 300]}, "label_too_long") == "not"
    assert refused(endpoint, {"text": "東京"}) == "text"
    assert refused(endpoint, {"text": "a", "not": ["東京"]}) == "not"
    assert refused(endpoint, {"text": "a", "model": "other"}, "model_not_found", 404) == "model"
    many = {**{f"field {number}": 1 for number in range(20)}, "text": "a", "not": ["b"]}
    assert refused(endpoint, many) == "field 0"


def test_an_unknown_field_is_refused_however_many_fields_are_given(endpoint: Endpoint) -> None:
    """`not` is the name of a field in JSON, and not in Python."""
    body = {
        "not": ["b"], "text": "a", "model": "tiny", "labels": [RED], "top": 1, "cutoff": "none", "fold": False,
        "thumbnails": False, "like": f"{RED}/000000", "image": data_uri(shape_png()), "unknown": 1,
    }  # fmt: skip
    assert refused(endpoint, body) == "unknown"


def test_several_texts_and_text_with_an_image_are_composed(endpoint: Endpoint) -> None:
    image = data_uri(shape_png(RED))
    bodies: list[dict[str, Any]] = [
        {"text": ["red", "circle"], "cutoff": "none", "top": 3},
        {"text": "red", "image": image, "cutoff": "none", "top": 3},
        {"text": "red", "like": f"{RED}/000000", "cutoff": "none", "top": 3},
    ]
    for body in bodies:
        answer = found(endpoint, **body)
        assert len(answer["data"]) == 3
        assert all(key.startswith("red ") for key in keys(answer))
        assert answer["notes"] == []
    assert found(endpoint, text=["red circle", "red circle"])["data"]


def test_other_methods_and_encodings_are_as_on_other_routes(endpoint: Endpoint) -> None:
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        response = endpoint.client.request(method, "/v1/search")
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
    packed = gzip.compress(json.dumps({"text": RED}).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = endpoint.client.post("/v1/search", content=packed, headers=headers)
    assert response.status_code == 200
    assert {"search", "total"} <= {part.partition(";")[0] for part in response.headers["server-timing"].split(", ")}
    assert response.headers["x-sightline-labels"] == response.json()["fingerprint"]["labels"]
    assert endpoint.client.post("/v1/search?top=1", json={"text": RED}).json()["error"]["param"] == "top"
    assert endpoint.client.post("/v1/search", data={"text": RED}).status_code == 415


def test_the_models_card_says_what_is_searched(endpoint: Endpoint) -> None:
    [card] = endpoint.client.get("/v1/models").json()["data"]
    assert (card["search"]["rows"], card["search"]["thumbnails"]) == (ROWS, True)
    assert card["search"]["index"] == has_index(endpoint)
    assert set(SHOWN) < set(card["search"]["labels"])


def test_without_a_searched_output_the_route_answers_404_and_names_the_key() -> None:
    with run_endpoint(make_config()) as running:
        response = running.post("/v1/search", {"text": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
        assert "search.output" in response.json()["error"]["message"]
        assert "search" not in running.client.get("/v1/models").json()["data"][0]


def test_a_search_needs_a_key_and_counts_as_an_item(folder: Path, tmp_path: Path) -> None:
    key, line = new_key("user")
    (tmp_path / "keys").write_text(line + "\n")
    auth = {"keys_file": str(tmp_path / "keys"), "items_per_minute": 3}
    with run_endpoint(make_config(search={"output": str(folder / "exact")}, auth=auth)) as running:
        assert running.post("/v1/search", {"text": RED}).status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        left = []
        for _ in range(3):
            response = running.post("/v1/search", {"like": "000000-000000/3"}, headers=headers)
            left.append(int(response.headers["x-ratelimit-remaining-items"]))
        assert left == [2, 1, 0]
        response = running.post("/v1/search", {"like": "000000-000000/3"}, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")


def test_a_key_that_several_images_have_is_refused_with_their_ids(tmp_path: Path) -> None:
    output = write_shapes(tmp_path / "tags", make_shapes(1, thumbnails=False, key=lambda row: f"key {row // 2}"))
    for indexed in (False, True):
        if indexed:
            build_index(output)
        with run_endpoint(make_config(search={"output": output.uri})) as running:
            error = running.post("/v1/search", {"like": "key 3"}).json()["error"]
            assert error["param"] == "like"
            assert "000000-000000/6, 000000-000000/7" in error["message"]
            assert keys(found(running, like="000000-000000/6", top=1))
            assert refused(running, {"text": "a", "thumbnails": True}, "unsupported_search") == "thumbnails"


def test_an_output_that_cannot_be_searched_is_refused_at_the_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(output: str) -> str:
        (tmp_path / "endpoint.yaml").write_text(f"model: {{source: tiny}}\nsearch: {{output: {output}}}\n")
        with pytest.raises(ConfigError) as error:
            prepare_endpoint(tmp_path / "endpoint.yaml", "127.0.0.1", 0)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "search.output: " in start(str(tmp_path / "none"))
    monkeypatch.setattr(output_module, "IN_MEMORY", 100)
    assert "240 images and no index: run `sightline index" in start(str(folder / "exact"))
    monkeypatch.setattr(output_module, "IN_MEMORY", 200_000)
    with pytest.raises(ConfigError, match=r"search\.output: .* has embeddings of the model .*, and this endpoint runs"):
        read_output(str(folder / "exact"), "sha256:another")
    monkeypatch.setitem(__import__("sys").modules, "lancedb", None)
    assert "pip install 'sightline[lancedb]'" in start(str(folder / "index"))
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "endpoint.yaml")])
    assert (result.exit_code, "Traceback" in result.output) == (2, False)


def test_a_relative_output_is_found_beside_the_settings_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "endpoint.yaml").write_text("search: {output: exact}\n")
    monkeypatch.chdir(tmp_path)
    config = prepare_endpoint(folder / "endpoint.yaml", "127.0.0.1", 0)
    assert config.search is not None
    assert config.search.output == str(folder / "exact")


def test_estimates_are_called_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_search, "FOUND", 4)
    with run_endpoint(make_config(search={"output": str(folder / "index")})) as running:
        answer = found(running, text=RED, top=1)
        assert answer["estimated"]
        assert answer["relevant"] == pytest.approx(12, abs=3)
        assert not found(running, text=RED, top=100)["estimated"]


def test_a_response_is_bounded(folder: Path) -> None:
    limits = {"response_bytes": 20_000}
    with run_endpoint(make_config(search={"output": str(folder / "exact")}, limits=limits)) as running:
        assert found(running, text=RED, top=5, cutoff="none")["data"]
        response = running.post("/v1/search", {"text": RED, "top": 1000, "cutoff": "none"})
        assert response.json()["error"]["code"] == "response_too_large"
        response = httpx.post(
            f"{running.url}/v1/search", json={"text": RED, "top": 50, "thumbnails": True, "cutoff": "none"}
        )
        assert response.json()["error"]["code"] == "response_too_large"
        assert running.service.admission.in_flight.bytes == 0
