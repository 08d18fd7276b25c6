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
    """Ray Serve with two model replicas. Yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rayserve.start(http_options={"host": "127.0.0.1", "port": port})
    rayserve.run(build(make_config(**REPLICAS)), name="sightline")
    yield f"http://127.0.0.1:{port}"
    rayserve.shutdown()


class Load:
    """Clients that ask one thing after another, and what they were answered."""

    def __init__(self) -> None:
        self.answers: list[httpx.Response] = []
        self.errors: list[Exception] = []

    def statuses(self) -> Counter[int]:
        return Counter(answer.status_code for answer in self.answers)


@contextmanager
def load(url: str, clients: int, body: dict[str, Any] = BODY) -> Iterator[Load]:
    found, stop = Load(), threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not stop.is_set():
                try:
                    found.answers.append(client.post("/v1/classify", json=body))
                except httpx.HTTPError as error:
                    found.errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
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
    """A deployment's processes."""
    return find_workers(f"ray::ServeReplica:sightline:{deployment}")


def test_it_answers_as_without_ray(served: str) -> None:
    with httpx.Client(base_url=served, timeout=60) as client:
        answer = client.post("/v1/classify", json={**BODY, "threshold": 0, "top_k": 64})
        assert answer.status_code == 200
        assert len(answer.headers.get_list("x-request-id")) == 1
        assert all(f"{stage};dur=" in answer.headers["server-timing"] for stage in ("decode", "batch", "forward"))
        assert client.get("/readyz").status_code == 200
        named = client.get("/v1/models", headers={"x-request-id": "mine"})
        assert named.headers.get_list("x-request-id") == ["mine"]
    with run_endpoint(make_config()) as local:
        here = local.post("/v1/classify", {**BODY, "threshold": 0, "top_k": 64}).json()
    there = answer.json()
    assert there["fingerprint"] == here["fingerprint"]
    scores = [{row["label"]: row["score"] for row in body["data"][0]["labels"]} for body in (there, here)]
    np.testing.assert_allclose([scores[0][name] for name in scores[1]], list(scores[1].values()), rtol=1e-4)


def test_a_batch_of_real_images_gets_through(served: str, tmp_path: Path) -> None:
    """Images of 256 x 256 and batches as a GPU takes them: twelve megabytes a call, where Ray Serve's own take four."""
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
            sorted((one["label"], one["score"]) for one in answer.json()["data"][-1]["labels"])
            for answer in (together, alone)
        ]
        assert len(together.json()["data"]) == 64
        for one, other in zip(*scores, strict=True):
            assert one[0] == other[0]
            assert one[1] == pytest.approx(other[1], abs=1e-5)
    finally:
        rayserve.run(build(make_config(**REPLICAS)), name="sightline")


def test_another_model_takes_the_place_of_one_without_a_mixture(served: str, tmp_path: Path) -> None:
    """Ingresses and replicas are replaced at the same time: each answer has the numbers of the model that it names."""
    init_checkpoint(tmp_path / "model", "tiny", seed=3)
    image, texts = data_uri(shape_png("red circle")), ["red circle", "blue star"]
    body = {"image": image, "labels": texts}
    new = {"source": str(tmp_path / "model"), "dtype": "float32", "batch_size": 16}

    def scores(answer: httpx.Response) -> tuple[float, ...]:
        labels = {one["label"]: one["score"] for one in answer.json()["data"][0]["labels"]}
        return tuple(labels[text] for text in texts)

    with httpx.Client(base_url=served, timeout=60) as client:
        before = client.post("/v1/classify", json=body)
        with load(served, 4, body) as found:
            rayserve.run(build(make_config(model=new, **REPLICAS)), name="sightline")
            time.sleep(2)
        after = [client.post("/v1/classify", json=body) for _ in range(20)]
        rayserve.run(build(make_config(**REPLICAS)), name="sightline")
        again = [client.post("/v1/classify", json=body) for _ in range(20)]
    assert {answer.status_code for answer in [before, *after, *again]} == {200}
    known = {answer.json()["fingerprint"]["model"]: scores(answer) for answer in (before, after[0])}
    assert len(known) == 2
    assert found.statuses().keys() <= {200, 503}, found.statuses()
    for answer in [*found.answers, *after, *again]:
        if answer.status_code == 200:
            assert scores(answer) == pytest.approx(known[answer.json()["fingerprint"]["model"]], abs=1e-4)
    assert {answer.json()["fingerprint"]["model"] for answer in after} == {after[0].json()["fingerprint"]["model"]}
    assert {answer.json()["fingerprint"]["model"] for answer in again} == {before.json()["fingerprint"]["model"]}


def test_a_killed_replica_costs_what_it_held(served: str) -> None:
    with load(served, 8) as found:
        time.sleep(1)
        before = len(found.answers)
        assert before
        victim = find_replicas("model")[0]
        os.kill(victim.pid, signal.SIGKILL)
        time.sleep(6)
        after = len(found.answers)
    assert not found.errors
    assert found.statuses().keys() <= {200, 503}
    failed = [answer for answer in found.answers if answer.status_code == 503]
    assert len(failed) <= 8, "no more than it held"
    for answer in failed:
        assert answer.json()["error"]["code"] == "unavailable"
        assert int(answer.headers["retry-after"]) >= 1
    assert after > before + 8, "the other replica goes on"


def test_a_killed_ingress_is_503_too(served: str) -> None:
    with load(served, 8) as found:
        time.sleep(1)
        [victim] = find_replicas("ingress")
        os.kill(victim.pid, signal.SIGKILL)
        for _ in range(300):
            time.sleep(0.1)
            if found.answers[-1].status_code == 200 and find_replicas("ingress") not in ([], [victim]):
                break
    # Of an answer that has begun nobody can make another.
    assert len(found.errors) <= 8, "no more than it held"
    assert all(isinstance(error, httpx.RemoteProtocolError) for error in found.errors), found.errors
    assert found.statuses().keys() <= {200, 503, 429}, found.statuses()
    for answer in found.answers:
        if answer.status_code != 200:
            assert answer.json()["error"]["code"] in ("unavailable", "overloaded")
            assert int(answer.headers["retry-after"]) >= 1


def test_an_update_under_load_fails_no_request(served: str) -> None:
    sets = {"shapes": {"names": ["red circle", "blue star"], "threshold": 0.0}}
    with load(served, 6) as found:
        time.sleep(1)
        rayserve.run(build(make_config(label_sets=sets, **REPLICAS)), name="sightline")
        time.sleep(1)
    assert not found.errors
    assert found.statuses().keys() == {200}, [a.text for a in found.answers if a.status_code != 200][:3]
    assert len(found.answers[0].json()["data"][0]["labels"]) == 1
    assert len(found.answers[-1].json()["data"][0]["labels"]) == 2, "the new label set is served"


def test_overload_is_answered_and_passes(served: str) -> None:
    limits = {"images": 1, "texts": 1, "labels": 2, "in_flight": 8}
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
    for answer in found.answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1
    assert late < early + 50e6
    with httpx.Client(base_url=served, timeout=60) as client:
        after = [client.post("/v1/classify", json=BODY) for _ in range(10)]
    assert {answer.status_code for answer in after} == {200}
    assert np.median([a.elapsed.total_seconds() for a in after]) < 10 * np.median(calm) + 0.5


def test_work_of_clients_that_have_gone_is_dropped(served: str) -> None:
    """Many images, asked and left at once: the next client does not wait for them."""
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
    assert took < 10 * full.elapsed.total_seconds(), "twenty requests that nobody waits for were not computed"


def test_a_client_that_leaves_takes_nobody_with_it(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first requests of an ingress are left while the model has them: images, and labels that another wants too."""
    monkeypatch.setattr(serve.rayserve.replica, "ModelServer", slow_model(1.0))
    rayserve.delete("sightline")
    rayserve.run(build(make_config(**REPLICAS)), name="sightline")
    new = {"image": BODY["image"], "labels": ["one that nobody asked", "and another"]}
    with httpx.Client(base_url=served, timeout=20) as client:
        other: list[httpx.Response] = []

        def ask_too() -> None:
            time.sleep(0.3)
            other.append(client.post("/v1/classify", json=new))

        wait = threading.Thread(target=ask_too)
        wait.start()
        for body in (new, BODY, {"model": "tiny", "input": "a text"}):
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/embeddings" if "input" in body else "/v1/classify", json=body, timeout=0.6)
        wait.join()
        assert other[0].status_code == 200, other[0].text
        for body in (BODY, new, BODY):
            answer = client.post("/v1/classify", json=body)
            assert answer.status_code == 200, answer.text
        assert client.get("/readyz").status_code == 200


def test_it_grows_under_load_and_shrinks_after(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve counts calls, of which an ingress has few under way, each with a batch in it."""
    monkeypatch.setattr(serve.rayserve.replica, "ModelServer", slow_model(0.5))
    scaling = {"min": 1, "max": 2, "num_cpus": 1, "upscale_delay_s": 1, "downscale_delay_s": 3}
    rayserve.delete("sightline")
    rayserve.run(build(make_config(replicas=scaling, ingress={**scaling, "decoders": 1})), name="sightline")
    assert [len(find_replicas(name)) for name in ("model", "ingress")] == [1, 1]

    def until(count: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while [len(find_replicas(name)) for name in ("model", "ingress")] != [count, count]:
            assert time.monotonic() < end, f"not {count} replicas each in {seconds} s"
            time.sleep(0.5)

    with load(served, 80) as found:
        until(2, 60)
    assert not found.errors
    assert found.statuses().keys() <= {200, 429}, found.statuses()
    assert found.statuses()[200] > found.statuses()[429]
    until(1, 60)
    with httpx.Client(base_url=served, timeout=60) as client:
        assert client.post("/v1/classify", json=BODY).status_code == 200


def test_an_ingress_does_not_load_torch(served: str) -> None:
    loaded = {
        name: any("libtorch" in file.path for file in process.memory_maps())
        for name in ("ingress", "model")
        for process in find_replicas(name)
    }
    assert loaded == {"ingress": False, "model": True}
