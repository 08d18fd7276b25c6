"""The endpoint on a real Ray Serve: its deployments, faults, updates and overload."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from ray import serve as rayserve

from serve.app import build
from tests.endpoint import data_uri, make_config, run_endpoint, shape_png

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
def load(url: str, clients: int) -> Iterator[Load]:
    found, stop = Load(), threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not stop.is_set():
                try:
                    found.answers.append(client.post("/v1/classify", json=BODY))
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
    """A deployment's processes, by the name that Ray gives them, of the Ray that this process started."""
    title = f"ray::ServeReplica:sightline:{deployment}"
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return found


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
    assert not found.errors
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
    assert np.median([a.elapsed.total_seconds() for a in after]) < 5 * np.median(calm) + 0.05


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
