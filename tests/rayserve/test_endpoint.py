"""The endpoint on a real Ray Serve: its deployments, faults, updates and overload."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from ray import serve as rayserve

import serve.rayserve.replica
from serve.app import build
from siglip.checkpoints.architectures import init_checkpoint
from tests.support.checkpoints import make_siglip
from tests.support.endpoint import data_uri, make_config, run_endpoint, shape_png
from tests.support.slow_endpoint import slow_model
from tests.support.workers import find_workers

REPLICAS: dict[str, Any] = {"replicas": {"min": 2, "num_cpus": 1}}
BODY = {"image": data_uri(shape_png("red circle")), "label_set": "shapes"}


@pytest.fixture(scope="module")
def served(local_ray: None) -> Iterator[str]:
    """The endpoint on Ray Serve with two model replicas. Yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rayserve.start(http_options={"host": "127.0.0.1", "port": port})
    rayserve.run(build(make_config(**REPLICAS)), name="sightline")
    yield f"http://127.0.0.1:{port}"
    rayserve.shutdown()


class Load:
    """The responses and errors that the clients of `load` got."""

    def __init__(self) -> None:
        self.responses: list[httpx.Response] = []
        self.errors: list[Exception] = []

    def statuses(self) -> Counter[int]:
        return Counter(response.status_code for response in self.responses)


@contextmanager
def load(url: str, clients: int, body: dict[str, Any] = BODY) -> Iterator[Load]:
    """Clients that each send one request after another until the block ends. Yields their responses and errors."""
    found, stop = Load(), threading.Event()

    def send() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not stop.is_set():
                try:
                    found.responses.append(client.post("/v1/classify", json=body))
                except httpx.HTTPError as error:
                    found.errors.append(error)

    threads = [threading.Thread(target=send) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        stop.set()
        for thread in threads:
            thread.join(90)
    assert not any(thread.is_alive() for thread in threads), "a request hangs"


def find_replicas(deployment: str) -> list[psutil.Process]:
    """Return the processes of a deployment's replicas."""
    return find_workers(f"ray::ServeReplica:sightline:{deployment}")


def test_it_responds_as_without_ray(served: str) -> None:
    with httpx.Client(base_url=served, timeout=60) as client:
        response = client.post("/v1/classify", json={**BODY, "threshold": 0, "top_k": 64})
        assert response.status_code == 200
        assert len(response.headers.get_list("x-request-id")) == 1
        assert all(f"{stage};dur=" in response.headers["server-timing"] for stage in ("decode", "batch", "forward"))
        assert client.get("/readyz").status_code == 200
        named = client.get("/v1/models", headers={"x-request-id": "mine"})
        assert named.headers.get_list("x-request-id") == ["mine"]
    with run_endpoint(make_config()) as local:
        here = local.post("/v1/classify", {**BODY, "threshold": 0, "top_k": 64}).json()
    there = response.json()
    assert there["fingerprint"] == here["fingerprint"]
    scores = [{row["label"]: row["score"] for row in body["data"][0]["labels"]} for body in (there, here)]
    np.testing.assert_allclose([scores[0][name] for name in scores[1]], list(scores[1].values()), rtol=1e-4)


def test_a_large_batch_reaches_the_model(served: str, tmp_path: Path) -> None:
    """64 images of 256 x 256 pixels make a call of 12 MB; Ray Serve refuses 4 MiB and more inside a message."""
    colors = ("red", "blue", "green")
    images = [data_uri(shape_png(f"{colors[n % 3]} circle", n)) for n in range(64)]
    model = {"source": str(make_siglip(tmp_path / "model")), "dtype": "float32", "batch_size": 256}
    rayserve.delete("sightline")
    try:
        rayserve.run(build(make_config(model=model)), name="sightline")
        with httpx.Client(base_url=served, timeout=60) as client:
            together = client.post("/v1/classify", json={"images": images, "labels": ["red", "blue"]})
            assert together.status_code == 200, together.text
            alone = client.post("/v1/classify", json={"images": images[63:], "labels": ["red", "blue"]})
        scores = [
            sorted((one["label"], one["score"]) for one in response.json()["data"][-1]["labels"])
            for response in (together, alone)
        ]
        assert len(together.json()["data"]) == 64
        for one, other in zip(*scores, strict=True):
            assert one[0] == other[0]
            assert one[1] == pytest.approx(other[1], abs=1e-5)
    finally:
        rayserve.run(build(make_config(**REPLICAS)), name="sightline")


def test_an_update_to_another_model_never_mixes_the_models(served: str, tmp_path: Path) -> None:
    """Ingresses and replicas are replaced at the same time. Each response has the scores of the model that it names."""
    init_checkpoint(tmp_path / "model", "tiny", seed=3)
    image, texts = data_uri(shape_png("red circle")), ["red circle", "blue star"]
    body = {"image": image, "labels": texts}
    new = {"source": str(tmp_path / "model"), "dtype": "float32", "batch_size": 16}

    def scores(response: httpx.Response) -> tuple[float, ...]:
        labels = {one["label"]: one["score"] for one in response.json()["data"][0]["labels"]}
        return tuple(labels[text] for text in texts)

    with httpx.Client(base_url=served, timeout=60) as client:
        before = client.post("/v1/classify", json=body)
        with load(served, 4, body) as found:
            rayserve.run(build(make_config(model=new, **REPLICAS)), name="sightline")
            time.sleep(2)
        after = [client.post("/v1/classify", json=body) for _ in range(20)]
        rayserve.run(build(make_config(**REPLICAS)), name="sightline")
        again = [client.post("/v1/classify", json=body) for _ in range(20)]
    assert {response.status_code for response in [before, *after, *again]} == {200}
    known = {response.json()["fingerprint"]["model"]: scores(response) for response in (before, after[0])}
    assert len(known) == 2
    assert found.statuses().keys() <= {200, 503}, found.statuses()
    for response in [*found.responses, *after, *again]:
        if response.status_code == 200:
            assert scores(response) == pytest.approx(known[response.json()["fingerprint"]["model"]], abs=1e-4)
    assert {response.json()["fingerprint"]["model"] for response in after} == {after[0].json()["fingerprint"]["model"]}
    assert {response.json()["fingerprint"]["model"] for response in again} == {before.json()["fingerprint"]["model"]}


def test_a_killed_replica_fails_only_the_requests_that_it_held(served: str) -> None:
    with load(served, 8) as found:
        time.sleep(1)
        before = len(found.responses)
        assert before
        victim = find_replicas("model")[0]
        os.kill(victim.pid, signal.SIGKILL)
        time.sleep(6)
        after = len(found.responses)
    assert not found.errors
    assert found.statuses().keys() <= {200, 503}
    failed = [response for response in found.responses if response.status_code == 503]
    assert len(failed) <= 8, "no more than it held"
    for response in failed:
        assert response.json()["error"]["code"] == "unavailable"
        assert int(response.headers["retry-after"]) >= 1
    assert after > before + 8, "the other replica keeps responding"


def test_a_killed_ingress_fails_only_the_requests_that_it_held(served: str) -> None:
    with load(served, 8) as found:
        time.sleep(1)
        [victim] = find_replicas("ingress")
        os.kill(victim.pid, signal.SIGKILL)
        for _ in range(300):
            time.sleep(0.1)
            if found.responses[-1].status_code == 200 and find_replicas("ingress") not in ([], [victim]):
                break
    # A response that has begun cannot be replaced by an error response.
    assert len(found.errors) <= 8, "no more than it held"
    assert all(isinstance(error, httpx.RemoteProtocolError) for error in found.errors), found.errors
    assert found.statuses().keys() <= {200, 503, 429}, found.statuses()
    for response in found.responses:
        if response.status_code != 200:
            assert response.json()["error"]["code"] in ("unavailable", "overloaded")
            assert int(response.headers["retry-after"]) >= 1


def test_an_update_under_load_fails_no_request(served: str) -> None:
    sets = {"shapes": {"names": ["red circle", "blue star"], "threshold": 0.0}}
    with load(served, 6) as found:
        time.sleep(1)
        rayserve.run(build(make_config(label_sets=sets, **REPLICAS)), name="sightline")
        time.sleep(1)
    assert not found.errors
    assert found.statuses().keys() == {200}, [a.text for a in found.responses if a.status_code != 200][:3]
    assert len(found.responses[0].json()["data"][0]["labels"]) == 1
    assert len(found.responses[-1].json()["data"][0]["labels"]) == 2, "the new label set is served"


def test_overload_is_refused_and_ends(served: str) -> None:
    limits = {"requests": 4}
    rayserve.run(build(make_config(limits=limits, **REPLICAS)), name="sightline")
    with httpx.Client(base_url=served, timeout=60) as client:
        calm = [client.post("/v1/classify", json=BODY).elapsed.total_seconds() for _ in range(10)]
    with load(served, 32) as found:
        time.sleep(2)
        [ingress] = find_replicas("ingress")
        early = ingress.memory_info().rss
        time.sleep(6)
        late = ingress.memory_info().rss
    assert not found.errors
    assert found.statuses().keys() == {200, 429}, found.statuses()
    for response in found.responses:
        if response.status_code == 429:
            assert response.json()["error"]["code"] == "overloaded"
            assert int(response.headers["retry-after"]) >= 1
    assert late < early + 50e6
    with httpx.Client(base_url=served, timeout=60) as client:
        after = [client.post("/v1/classify", json=BODY) for _ in range(10)]
    assert {response.status_code for response in after} == {200}
    assert np.median([a.elapsed.total_seconds() for a in after]) < 10 * np.median(calm) + 0.5


def test_requests_of_disconnected_clients_are_dropped(served: str) -> None:
    """Twenty clients send many images and disconnect at once. The next client does not wait for these images."""
    rayserve.run(build(make_config(**REPLICAS)), name="sightline")
    images = [BODY["image"]] * 64
    with httpx.Client(base_url=served, timeout=60) as client:
        full = client.post("/v1/classify", json={"images": images, "label_set": "shapes"})
        assert full.status_code == 200
        for _ in range(20):
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/classify", json={"images": images, "label_set": "shapes"}, timeout=0.02)
        start = time.monotonic()
        assert client.post("/v1/classify", json=BODY).status_code == 200
        took = time.monotonic() - start
    assert took < 10 * full.elapsed.total_seconds(), "the twenty requests without a client were not computed"


def test_a_disconnecting_client_does_not_fail_other_requests(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients disconnect while the model computes their requests. One has labels that another client needs."""
    monkeypatch.setattr(serve.rayserve.replica, "ModelServer", slow_model(1.0))
    rayserve.delete("sightline")
    rayserve.run(build(make_config(**REPLICAS)), name="sightline")
    new = {"image": BODY["image"], "labels": ["a label of no other test", "and another"]}
    with httpx.Client(base_url=served, timeout=20) as client:
        other: list[httpx.Response] = []

        def send_too() -> None:
            time.sleep(0.3)
            other.append(client.post("/v1/classify", json=new))

        wait = threading.Thread(target=send_too)
        wait.start()
        for body in (new, BODY, {"model": "tiny", "input": "a text"}):
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/embeddings" if "input" in body else "/v1/classify", json=body, timeout=0.6)
        wait.join()
        assert other[0].status_code == 200, other[0].text
        for body in (BODY, new, BODY):
            response = client.post("/v1/classify", json=body)
            assert response.status_code == 200, response.text
        assert client.get("/readyz").status_code == 200


def test_replicas_follow_the_load(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve counts ongoing calls. An ingress has only few of them, because each call carries a batch."""
    monkeypatch.setattr(serve.rayserve.replica, "ModelServer", slow_model(0.5))
    scaling = {"min": 1, "max": 2, "num_cpus": 1, "upscale_delay_s": 1, "downscale_delay_s": 3}
    rayserve.delete("sightline")
    rayserve.run(build(make_config(replicas=scaling, ingress={**scaling, "decoders": 1})), name="sightline")
    assert [len(find_replicas(name)) for name in ("model", "ingress")] == [1, 1]

    def wait_for(count: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while [len(find_replicas(name)) for name in ("model", "ingress")] != [count, count]:
            assert time.monotonic() < end, f"not {count} replicas each in {seconds} s"
            time.sleep(0.5)

    with load(served, 80) as found:
        wait_for(2, 60)
    assert not found.errors
    assert found.statuses().keys() <= {200, 429}, found.statuses()
    assert found.statuses()[200] > found.statuses()[429]
    wait_for(1, 60)
    with httpx.Client(base_url=served, timeout=60) as client:
        assert client.post("/v1/classify", json=BODY).status_code == 200


def test_an_ingress_does_not_load_torch(served: str) -> None:
    loaded = {
        name: any("libtorch" in file.path for file in process.memory_maps())
        for name in ("ingress", "model")
        for process in find_replicas(name)
    }
    assert loaded == {"ingress": False, "model": True}
