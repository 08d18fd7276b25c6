"""Large responses: their numbers and bounds, and that nobody else waits for them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from serve.admission.auth import new_key
from serve.admission.load import Permit
from serve.context import RequestContext
from serve.http.json_response import PIECE_NUMBERS, LongList, _list_steps, make_response
from serve.service import Service
from siglip.scoring import score_pairs, sigmoid
from tests.support.endpoint import Endpoint, data_uri, make_config, run_endpoint, shape_png

LABELS = 3000
IMAGES = [data_uri(shape_png("red circle", n)) for n in range(4)]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    many = {"names": [f"label {number}" for number in range(LABELS)], "threshold": 0.0, "top_k": None}
    limits = {"pairs": 4 * LABELS, "response_bytes": 2**21}
    with run_endpoint(make_config(label_sets={"many": many}, limits=limits)) as running:
        yield running


def make_rows(start: int, stop: int) -> list[dict[str, Any]]:
    one, values = np.float32(0.1), np.arange(3, dtype=np.float32)
    return [{"index": n, "values": values, "one": one} for n in range(start, stop)]


@pytest.mark.parametrize("rows", [0, 1, 2, PIECE_NUMBERS, 3 * PIECE_NUMBERS + 1])
def test_pieces_make_the_same_json_as_the_whole(rows: int) -> None:
    content = {
        "object": "list",
        "data": LongList(rows, 4, make_rows),
        "empty": {},
        "usage": {"total": 1},
        "several": [{"labels": LongList(rows, 4, make_rows)}, {"labels": LongList(0, 1, make_rows)}],
    }
    whole = json.loads(orjson.dumps(make_rows(0, rows), option=orjson.OPT_SERIALIZE_NUMPY))
    steps = list(_list_steps(content))
    written = json.loads(b"".join(step() for step in steps))
    assert written == {**content, "data": whole, "several": [{"labels": whole}, {"labels": []}]}
    assert len(steps) >= 2 * (rows * 4 // PIECE_NUMBERS)
    for step in steps:
        assert len(step()) < 40 * 2 * PIECE_NUMBERS


def test_every_label_of_a_large_set_has_the_score_of_the_batch_job(endpoint: Endpoint) -> None:
    response = endpoint.post("/v1/classify", {"images": IMAGES, "label_set": "many"})
    assert response.status_code == 200, response.text
    assert int(response.headers["content-length"]) == len(response.content)
    registered = endpoint.service.label_sets.registered["many"].embedded
    embedded = endpoint.post("/v1/embeddings", {"model": "tiny", "input": IMAGES}).json()["data"]
    expected = registered.head.scores(np.asarray([item["embedding"] for item in embedded], np.float32))
    for item, scores in zip(response.json()["data"], expected, strict=True):
        found = {one["label"]: one["score"] for one in item["labels"]}
        assert len(found) == LABELS
        np.testing.assert_allclose([found[name] for name in registered.names], scores, rtol=1e-5)
        values = [one["score"] for one in item["labels"]]
        assert values == sorted(values, reverse=True)


def test_similarities_are_those_of_the_embeddings(endpoint: Endpoint) -> None:
    texts = [f"text number {n}" for n in range(1000)]
    body = endpoint.post("/v1/similarity", {"texts": texts, "images": IMAGES}).json()
    assert [len(body[side]) for side in ("texts", "images")] == [1000, 4]
    vectors = endpoint.post("/v1/embeddings", {"model": "tiny", "input": [*IMAGES, *texts]}).json()["data"]
    rows = np.asarray([item["embedding"] for item in vectors], np.float32)
    cosines = rows[4:] @ rows[:4].T
    scores = sigmoid(score_pairs(rows[4:], rows[:4], endpoint.service.about.scale))
    for ranking in body["texts"]:
        assert [match["index"] for match in ranking["matches"]] == np.argsort(-cosines[ranking["index"]]).tolist()
    for ranking in body["images"]:
        for match in ranking["matches"]:
            assert match["cosine"] == pytest.approx(cosines[match["index"], ranking["index"]], abs=1e-5)
            assert match["score"] == pytest.approx(scores[match["index"], ranking["index"]], rel=1e-3)


def test_a_response_with_too_many_pairs_or_bytes_is_refused(endpoint: Endpoint) -> None:
    before = endpoint.service.admission.in_flight.bytes
    refused = endpoint.post("/v1/classify", {"images": [*IMAGES, IMAGES[0]], "label_set": "many"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_many_pairs")
    assert "top_k" in refused.json()["error"]["message"]
    fewer = {"images": [*IMAGES, IMAGES[0]], "label_set": "many", "top_k": 2000}
    assert endpoint.post("/v1/classify", fewer).status_code == 200
    refused = endpoint.post("/v1/embeddings", {"model": "tiny", "input": ["a"] * 2000})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "response_too_large")
    assert endpoint.post("/v1/embeddings", {"model": "tiny", "input": ["a"] * 500}).status_code == 200
    assert endpoint.service.admission.in_flight.bytes == before == 0


def test_a_response_holds_its_bytes_until_it_is_sent(endpoint: Endpoint) -> None:
    async def scenario(service: Service) -> None:
        with service.admission.admit(60) as permit:
            context = RequestContext("id", permit, service.worker)
            response = await make_response(LongList(100, 3, make_rows), service, context)
            assert service.admission.in_flight.bytes == int(response.headers["content-length"]) > 1000
        assert service.admission.in_flight.bytes == 0
        expired = RequestContext("id", Permit(time.monotonic() + 60), service.worker)
        assert (await make_response({}, service, expired)).headers["content-length"] == "2"

    asyncio.run(scenario(endpoint.service))


def test_more_texts_than_a_key_may_have_in_flight_wait_for_their_turn(endpoint: Endpoint) -> None:
    """OpenAI's clients send 10,000 texts as five requests of 2,048 at the same time."""
    limits = endpoint.service.config.limits
    assert 5 * limits.texts > limits.in_flight
    batches = [[f"text {n} of {batch}" for n in range(limits.texts)] for batch in range(5)]
    responses: list[httpx.Response] = []

    def send(texts: list[str]) -> None:
        body = {"model": "tiny", "input": texts, "encoding_format": "base64"}
        responses.append(endpoint.client.post("/v1/embeddings", json=body, timeout=120))

    with run_endpoint(make_config(limits={"deadline_s": 100}), endpoint.model) as endpoint:
        threads = [threading.Thread(target=send, args=[texts]) for texts in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [response.status_code for response in responses] == [200] * 5, [r.text[:200] for r in responses]


@pytest.mark.alone
def test_health_checks_are_quick_beside_the_largest_responses(tmp_path: Path) -> None:
    """Eight clients each have the largest responses written without a pause, of similarities, labels and embeddings."""
    key, line = new_key("greedy")
    (tmp_path / "keys").write_text(line + "\n")
    many = {"names": [f"label {number}" for number in range(30_000)], "threshold": 0.0, "top_k": None}
    config = make_config(label_sets={"many": many}, auth={"keys_file": str(tmp_path / "keys")})
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("/v1/similarity", {"texts": [f"text {n}" for n in range(2048)], "images": IMAGES * 16}),
        ("/v1/classify", {"images": IMAGES * 2, "label_set": "many", "top_k": 30_000}),
        ("/v1/embeddings", {"model": "tiny", "input": [f"text {n}" for n in range(2048)], "encoding_format": "float"}),
        ("/v2/embed", {"model": "tiny", "texts": [f"text {n}" for n in range(2048)],
                       "embedding_types": ["float", "int8", "uint8", "binary", "ubinary", "base64"]}),
    ]  # fmt: skip
    stop, numbers = threading.Event(), count()
    sizes: list[int] = []

    def send(url: str) -> None:
        with httpx.Client(base_url=url, timeout=120, headers={"authorization": f"Bearer {key}"}) as client:
            while not stop.is_set():
                path, body = kinds[next(numbers) % len(kinds)]
                response = client.post(path, json=body)
                assert response.status_code in (200, 429), response.text[:300]
                sizes.append(len(response.content))

    with run_endpoint(config) as endpoint:
        threads = [threading.Thread(target=send, args=[endpoint.url]) for _ in range(8)]
        for thread in threads:
            thread.start()
        waits = []
        try:
            while len(sizes) < 24:
                start = time.monotonic()
                assert endpoint.client.get("/healthz").status_code == 200
                waits.append(time.monotonic() - start)
                time.sleep(0.02)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert max(sizes) > 14e6
    print(sorted(waits)[-10:], np.median(waits), len(waits))
    assert np.quantile(waits, 0.95) < 0.1, sorted(waits)[-10:]
