"""The search of an endpoint while its output grows, while it is busy, and while files go away."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from curation.index.build import build_index
from curation.tagged_output import open_output
from pipelines.upkeep.compaction import compact_output
from serve.admission.auth import new_key
from serve.search import output as output_module
from serve.search import service as service_module
from serve.search.output import SearchedOutput
from serve.search.service import SearchService
from tests.support.endpoint import Endpoint, make_config, run_endpoint
from tests.support.growing_output import GrowingOutput
from tests.support.jobs import RecordedProgress
from tests.support.searched_output import make_shapes, write_shapes

ALL = {"text": "red circle", "cutoff": "none", "top": 1000}
PATIENCE = 60.0


def make_growing(root: Path) -> GrowingOutput:
    """An output without images, of the shipped checkpoint."""
    return GrowingOutput(root, make_shapes(0, thumbnails=False))


def searched(endpoint: Endpoint) -> SearchService:
    assert endpoint.service.search is not None
    return endpoint.service.search


def await_answer(endpoint: Endpoint, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Search again and again until the answer is as expected."""
    until = time.monotonic() + PATIENCE
    while True:
        response = endpoint.post("/v1/search", ALL)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        if is_it(answer):
            return answer
        assert time.monotonic() < until, answer["as_of"]
        time.sleep(0.1)


def ids_of(root: Path) -> set[str]:
    return set(open_output(str(root)).to_arrow(["id"])["id"].to_pylist())


def ids(answer: dict[str, Any]) -> set[str]:
    found = [row["id"] for row in answer["data"]]
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize("indexed", [False, True], ids=["exact", "index"])
def test_new_commits_are_found_and_each_image_once(tmp_path: Path, indexed: bool) -> None:
    growing = make_growing(tmp_path / "tags")
    growing.grow(8, 10, rejected=[3])  # as many files as a compaction merges
    if indexed:
        build_index(open_output(str(growing.root)))
    search = {"output": str(growing.root), "refresh_seconds": 1}
    with run_endpoint(make_config(search=search)) as endpoint:
        first = endpoint.post("/v1/search", ALL).json()
        assert ids(first) == ids_of(growing.root)
        growing.grow(1, 20)
        grown = await_answer(endpoint, lambda answer: answer["rows"] == 92)
        assert ids(grown) == ids_of(growing.root)
        assert grown["as_of"]["opened_at"] >= first["as_of"]["opened_at"]
        growing.retry()
        retried = await_answer(endpoint, lambda answer: answer["rows"] == 100)
        assert ids(retried) == ids_of(growing.root)
        before = searched(endpoint).opened
        compact_output(growing.output, RecordedProgress())
        await_answer(endpoint, lambda answer: searched(endpoint).opened is not before)
        assert ids(endpoint.post("/v1/search", ALL).json()) == ids_of(growing.root)
        for key in (min(ids_of(growing.root)), max(ids_of(growing.root))):  # the ids of this output are its keys too
            near = endpoint.post("/v1/search", {"like": key, "top": 3})
            assert near.status_code == 200, near.text
            assert key not in ids(near.json())
        if indexed:
            before = searched(endpoint).opened
            assert before.recent
            build_index(open_output(str(growing.root)))
            await_answer(endpoint, lambda answer: searched(endpoint).opened is not before)
            assert not searched(endpoint).opened.recent, "what the index has is not held"
            assert ids(endpoint.post("/v1/search", ALL).json()) == ids_of(growing.root)


def test_a_state_that_cannot_be_opened_leaves_the_earlier_one_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = make_growing(tmp_path / "tags")
    growing.grow(1, 20)
    counted: list[str] = []
    with run_endpoint(make_config(search={"output": str(growing.root), "refresh_seconds": 1})) as endpoint:
        monkeypatch.setattr(endpoint.service.metrics, "count_refresh", counted.append)
        manifest = growing.root / "manifest.json"
        good = manifest.read_text()
        manifest.write_text("{")
        with caplog.at_level("ERROR", "ray.serve.sightline"):
            broken = await_answer(endpoint, lambda answer: answer["as_of"]["problem"] is not None)
            time.sleep(2.5)
        assert len(ids(broken)) == 20
        assert str(growing.root) not in broken["as_of"]["problem"]
        lines = [record.getMessage() for record in caplog.records if "the earlier state is kept" in record.getMessage()]
        assert len(lines) == 1, "it is not logged again at each look"
        assert "manifest.json" in lines[0]
        manifest.write_text(good)
        growing.grow(1, 10)
        mended = await_answer(endpoint, lambda answer: answer["rows"] == 30)
        assert mended["as_of"]["problem"] is None
        assert {"failed", "changed"} <= set(counted)


def test_a_search_goes_on_if_the_files_of_its_state_were_deleted(tmp_path: Path) -> None:
    growing = make_growing(tmp_path / "tags")
    growing.grow(8, 10)
    with run_endpoint(make_config(search={"output": str(growing.root), "refresh_seconds": 3600})) as endpoint:
        assert endpoint.post("/v1/search", ALL).status_code == 200
        compact_output(growing.output, RecordedProgress())
        assert len(growing.data_files()) == 1
        response = endpoint.post("/v1/search", ALL)
        assert response.status_code == 200, response.text
        assert ids(response.json()) == ids_of(growing.root)
        for path in (growing.root / "data").glob("*"):
            path.unlink()
        response = endpoint.post("/v1/search", ALL)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
        assert int(response.headers["retry-after"]) >= 1
        assert str(growing.root) not in response.text


def test_an_index_that_is_deleted_and_made_anew_is_followed(tmp_path: Path) -> None:
    """Its table has the same address and the same version as the one before, and other rows."""
    growing = make_growing(tmp_path / "tags")
    growing.grow(3, 20)
    build_index(open_output(str(growing.root)))
    with run_endpoint(make_config(search={"output": str(growing.root), "refresh_seconds": 1})) as endpoint:
        first = endpoint.post("/v1/search", ALL).json()
        assert ids(first) == ids_of(growing.root)
        before = searched(endpoint).opened
        growing.grow(2, 15)
        shutil.rmtree(growing.root / "index")
        build_index(open_output(str(growing.root)))
        await_true(lambda: searched(endpoint).opened is not before and not searched(endpoint).opened.recent)
        index = searched(endpoint).opened.index
        assert index is not None
        assert before.index is not None
        assert index.state.about.version == before.index.state.about.version
        again = await_answer(endpoint, lambda answer: answer["rows"] == 90)
        assert ids(again) == ids_of(growing.root)


def test_images_that_are_too_many_to_be_compared_besides_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = make_growing(tmp_path / "tags")
    growing.grow(2, 30)
    build_index(open_output(str(growing.root)))
    growing.grow(1, 25)
    for most, expected in ((25, 85), (24, 60)):
        monkeypatch.setattr(output_module, "IN_MEMORY", most)
        with run_endpoint(make_config(search={"output": str(growing.root)})) as endpoint:
            answer = endpoint.post("/v1/search", ALL).json()
            assert (answer["rows"], answer["searched"], len(ids(answer))) == (85, expected, expected)
            assert answer["as_of"]["not_searched"] == 85 - expected


@contextmanager
def blocked(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Searches do not end until the block ends. Yields the texts of those that have begun."""
    release, begun = threading.Event(), list[str]()
    search = SearchedOutput.search

    def wait(self: SearchedOutput, query: Any, terms: Any) -> Any:
        begun.append(query.texts[0])
        assert release.wait(PATIENCE)
        return search(self, query, terms)

    with monkeypatch.context() as patch:
        patch.setattr(SearchedOutput, "search", wait)
        try:
            yield begun
        finally:
            release.set()


def await_true(is_it: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not is_it():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_slow_search_holds_up_no_other_route_and_a_deadline_that_passes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = write_shapes(tmp_path / "tags")
    with (
        run_endpoint(make_config(search={"output": output.uri})) as endpoint,
        ThreadPoolExecutor(4) as threads,
        blocked(endpoint, monkeypatch) as begun,
    ):
        slow = threads.submit(endpoint.post, "/v1/search", {"text": "slow"})
        await_true(lambda: begun == ["slow"])
        late = threads.submit(
            endpoint.post, "/v1/search", {"text": "late"}, headers={"x-request-timeout-seconds": "0.5"}
        )
        assert endpoint.client.get("/healthz").status_code == 200
        assert endpoint.post("/v1/embeddings", {"model": "tiny", "input": "a"}).status_code == 200
        response = late.result(PATIENCE)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "deadline_exceeded")
        assert searched(endpoint)._held.total() == 1
        assert not slow.done()
    assert slow.result(PATIENCE).status_code == 200
    assert begun == ["slow"], "a search whose deadline has passed is not begun"


def test_more_searches_than_the_queue_holds_are_refused_and_one_key_may_have_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = write_shapes(tmp_path / "tags")
    (greedy, first), (modest, second) = new_key("greedy"), new_key("modest")
    (tmp_path / "keys").write_text(f"{first}\n{second}\n")
    monkeypatch.setattr(service_module, "QUEUE", 4)
    config = make_config(search={"output": output.uri}, auth={"keys_file": str(tmp_path / "keys")})
    by = {name: {"authorization": f"Bearer {key}"} for name, key in (("greedy", greedy), ("modest", modest))}
    with (
        run_endpoint(config) as endpoint,
        ThreadPoolExecutor(8) as threads,
        blocked(endpoint, monkeypatch),
    ):

        def send(name: str) -> httpx.Response:
            return httpx.post(f"{endpoint.url}/v1/search", json={"text": "red"}, headers=by[name], timeout=PATIENCE)

        held = [threads.submit(send, "greedy") for _ in range(2)]
        await_true(lambda: searched(endpoint)._held.total() == 2)
        refused = send("greedy")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert "of this key" in refused.json()["error"]["message"]
        held += [threads.submit(send, "modest") for _ in range(2)]
        await_true(lambda: searched(endpoint)._held.total() == 4)
        refused = send("modest")
        assert (refused.status_code, int(refused.headers["retry-after"]) >= 1) == (429, True)
        assert "of this key" not in refused.json()["error"]["message"]
    assert [one.result(PATIENCE).status_code for one in held] == [200] * 4


def test_a_search_stays_on_the_state_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    growing = make_growing(tmp_path / "tags")
    growing.grow(1, 20)
    with (
        run_endpoint(make_config(search={"output": str(growing.root), "refresh_seconds": 1})) as endpoint,
        ThreadPoolExecutor(1) as threads,
    ):
        with blocked(endpoint, monkeypatch) as begun:
            early = threads.submit(endpoint.post, "/v1/search", ALL)
            await_true(lambda: bool(begun))
            growing.grow(1, 10)
            await_true(lambda: searched(endpoint).opened.output.rows == 30)
        assert early.result(PATIENCE).json()["rows"] == 20
        assert endpoint.post("/v1/search", ALL).json()["rows"] == 30


def test_many_searches_at_once_have_the_answers_of_one_after_another(tmp_path: Path) -> None:
    output = write_shapes(tmp_path / "tags")
    build_index(output)
    bodies = [{"text": text, "labels": [text], "cutoff": "none"} for text in ("red circle", "blue star", "red star")]

    async def send(url: str) -> list[list[dict[str, Any]]]:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            responses = await asyncio.gather(*(client.post("/v1/search", json=body) for body in bodies * 8))
            return [response.json()["data"] for response in responses]

    with run_endpoint(make_config(search={"output": output.uri})) as endpoint:
        alone = [endpoint.post("/v1/search", body).json()["data"] for body in bodies]
        assert all(alone)
        assert asyncio.run(send(endpoint.url)) == alone * 8
