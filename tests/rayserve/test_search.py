"""The search on a real Ray Serve, over an output of a real job that grows, with a real index."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from ray import serve as rayserve

from curation.index.build import build_index
from curation.tagged_output import open_output
from serve.app import build
from sightline.demo.shapes import LABELS, render
from tests.support.endpoint import make_config

PATIENCE = 90.0
EACH = 6
"""Images of each label."""


def tag(folder: Path, *labels: str) -> None:
    """Add images of labels to the input, and tag what is new, with the command and a Ray of its own."""
    (folder / "input").mkdir(exist_ok=True)
    for label in labels:
        for number in range(EACH):
            render(label, random.Random(number), (96, 64)).save(folder / "input" / f"{label} {number}.png")
    config = {
        "input": str(folder / "input"),
        "output": str(folder / "tags"),
        "model": {"source": "tiny", "dtype": "float32"},
        "labels": {"names": list(LABELS), "templates": ["a photo of a {label}"], "threshold": 0.2},
        "thumbnails": 64,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "sightline", "tag", str(folder / "job.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tagged and indexed output in `tags`."""
    tag(tmp_path, "red circle", "blue star")
    build_index(open_output(str(tmp_path / "tags")))
    return tmp_path


@pytest.fixture
def url(local_ray: None, folder: Path) -> Iterator[str]:
    """The URL of an endpoint with two ingresses that search the output."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rayserve.start(http_options={"host": "127.0.0.1", "port": port})
    search = {"output": str(folder / "tags"), "refresh_seconds": 1}
    rayserve.run(build(make_config(search=search, ingress={"min": 2, "decoders": 1})), name="sightline")
    yield f"http://127.0.0.1:{port}"
    rayserve.shutdown()


def test_an_output_is_searched_and_what_a_later_job_adds_is_found_by_each_ingress(folder: Path, url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        body = {"text": "red circle", "thumbnails": True}
        found = client.post("/v1/search", json=body)
        assert found.status_code == 200, found.text
        assert sorted(row["key"] for row in found.json()["data"]) == sorted(f"red circle {n}.png" for n in range(EACH))
        assert all(row["thumbnail"].startswith("data:image/jpeg;base64,") for row in found.json()["data"])
        assert client.post("/v1/search", json={"text": "green ring"}).json()["data"] == []
        tag(folder, "green ring")
        until, seen = time.monotonic() + PATIENCE, 0
        while seen < 20:  # the ingresses answer in turns: each has to know the new images
            answer = client.post("/v1/search", json={"text": "green ring", "labels": ["green ring"]}).json()
            seen = seen + 1 if answer["rows"] == 3 * EACH else 0
            if seen:
                assert sorted(row["key"] for row in answer["data"]) == [f"green ring {n}.png" for n in range(EACH)]
            assert time.monotonic() < until, answer["as_of"]
            time.sleep(0.1)
        build_index(open_output(str(folder / "tags")))
        for _ in range(30):
            answer = client.post("/v1/search", json={"text": "green ring"}).json()
            assert len(answer["data"]) == EACH
            time.sleep(0.1)


def test_searches_of_clients_that_leave_do_not_hold_up_others(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.post("/v1/search", json={"text": "red circle"}).status_code == 200
        left = 0
        for number in range(60):
            try:
                client.post("/v1/search", json={"text": f"a new text {number}", "cutoff": "none"}, timeout=0.003)
            except httpx.TimeoutException:
                left += 1
        assert left > 10
        started = time.monotonic()
        assert client.post("/v1/search", json={"text": "blue star"}).status_code == 200
        assert time.monotonic() - started < PATIENCE
