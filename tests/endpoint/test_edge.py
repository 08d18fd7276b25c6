"""Keys, rates and fetching through the real application: what a client on the wire is told."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from serve.admission.auth import REREAD_SECONDS, new_key
from serve.fetch.fetcher import CODES
from sightline.demo.shapes import render
from tests.quick.serve.test_fetch import HOSTILE, METADATA, Respond, Web, drip, redirect, reply
from tests.support.endpoint import Endpoint, make_config, run_endpoint
from tests.support.images import encode

IMAGE = encode(render("red circle", random.Random(1)))
ASK = {"labels": ["red circle", "blue square"], "image": "?"}


@contextlib.contextmanager
def serve_web(answers: dict[str, Respond]) -> Iterator[Web]:
    """A web server on loopback in a thread of its own."""
    web, started, loop = Web(answers), threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with web.run():
            started.set()
            await stop.wait()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.1)  # for the connections to close before their loop does

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(60)
    try:
        yield web
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def check_envelope(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """OpenAI's error envelope with this status and code. Returns what is in it."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    return error


def test_keys_and_rates(tmp_path: Path) -> None:
    (alice, first), (bob, second) = new_key("alice"), new_key("bob")
    (tmp_path / "keys").write_text(f"{first}\n{second}\n")
    auth = {"keys_file": str(tmp_path / "keys"), "requests_per_minute": 3}
    with run_endpoint(make_config(auth=auth)) as endpoint, httpx2.Client(base_url=endpoint.url) as client:
        ask = {**ASK, "image": f"data:image/png;base64,{encode_base64(IMAGE)}"}

        def post(key: str) -> httpx2.Response:
            return client.post("v1/classify", json=ask, headers={"authorization": f"Bearer {key}"})

        wrong = [b"Bearer", b"Bearer sl-wrong", b"Bearer \xe9", b"Basic " + alice.encode(), alice.encode()]
        for value in (None, *wrong, b"Bearer " + alice[:-1].encode()):
            answer = client.post("v1/classify", json=ask, headers=[] if value is None else [(b"authorization", value)])
            error = check_envelope(answer, 401, "invalid_api_key")
            assert error["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert alice[:-1] not in answer.text
        for path in ("v1/models", "v1/label-sets", "v1/nowhere"):
            check_envelope(client.get(path), 401, "invalid_api_key")
        for path in ("", "playground/app.js", "healthz", "readyz", "openapi.json"):
            assert client.get(path).status_code == 200, path
        for left in (2, 1, 0):
            answer = post(alice)
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-limit-requests"] == "3"
            assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
            assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
        answer = post(alice)
        error = check_envelope(answer, 429, "rate_limit_exceeded")
        assert error["type"] == "rate_limit_error"
        assert 1 <= int(answer.headers["retry-after"]) <= 20
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        assert post(bob).status_code == 200  # a rate for each key
        # Alice's key is taken away while the server runs, and Carol gets one.
        carol, third = new_key("carol")
        (tmp_path / "keys").write_text(f"{second}\n{third}\n")
        threading.Event().wait(REREAD_SECONDS + 0.1)
        check_envelope(post(alice), 401, "invalid_api_key")
        assert post(carol).status_code == 200


def test_without_keys_only_this_machine_is_answered() -> None:
    with run_endpoint(make_config()) as endpoint:
        assert httpx2.get(f"{endpoint.url}/v1/models").status_code == 200
        for headers in ({"host": "rebound.example"}, {"x-forwarded-for": "203.0.113.9"}):
            answer = httpx2.get(f"{endpoint.url}/v1/models", headers=headers)
            assert check_envelope(answer, 403, "loopback_only")["type"] == "permission_error"


def test_fetching_is_off_by_default() -> None:
    with run_endpoint(make_config()) as endpoint:
        for path, body, param in requests_for("http://example.org/a.jpg"):
            error = check_envelope(httpx2.post(f"{endpoint.url}/{path}", json=body), 400, "fetch_disabled")
            assert "fetch.enabled" in error["message"]
            assert error["param"] == param


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    answers = {
        "/good.png": reply(IMAGE, Content_Type="image/png"),
        "/hop": redirect("/good.png"),
        "/metadata": redirect(f"http://{METADATA}/latest/meta-data/"),
        "/text": reply(b"hello"),
        "/large": reply(b"x" * 200_000),
        "/slow": drip(b"x", 0.1, b"HTTP/1.1 200 OK\r\n\r\n"),
        "/missing": reply(b"", "404 Not Found"),
        "/padded.png": reply(IMAGE + b"\0" * 60_000),
    }
    with serve_web(answers) as running:
        yield running


@contextlib.contextmanager
def run_fetching(web: Web, max_seconds: float) -> Iterator[Endpoint]:
    """An endpoint that may fetch from this server, each image within `max_seconds`."""
    fetch = {
        "enabled": True,
        "ports": [80, 443, web.port],
        "allowed_networks": ["127.0.0.1/32"],
        "max_bytes": 100_000,
        "max_seconds": max_seconds,
    }
    with run_endpoint(make_config(fetch=fetch, limits={"body_bytes": 150_000})) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def fetching(web: Web) -> Iterator[Endpoint]:
    with run_fetching(web, 60) as endpoint:  # more than a fetch on loopback needs on a busy machine
        yield endpoint


def test_images_by_url(web: Web, fetching: Endpoint) -> None:
    inline = f"data:image/png;base64,{encode_base64(IMAGE)}"
    for path in ("/good.png", "/hop"):
        url = f"http://127.0.0.1:{web.port}{path}"
        for (name, by_url, _), (_, by_value, _) in zip(requests_for(url), requests_for(inline), strict=True):
            one, two = (httpx2.post(f"{fetching.url}/{name}", json=body).json() for body in (by_url, by_value))
            assert one["data"] == two["data"]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/metadata", 400, "fetch_forbidden"),
        ("/text", 400, "not_an_image"),
        ("/large", 413, "fetch_too_large"),
        ("/missing", 400, "fetch_failed"),
    ],
)
def test_a_refused_url_names_its_field(path: str, status: int, code: str, web: Web, fetching: Endpoint) -> None:
    check_refused_url(path, status, code, web, fetching)


@pytest.mark.alone
def test_a_url_that_is_too_slow_names_its_field(web: Web) -> None:
    with run_fetching(web, 0.5) as endpoint:
        check_refused_url("/slow", 400, "fetch_timeout", web, endpoint)


def check_refused_url(path: str, status: int, code: str, web: Web, fetching: Endpoint) -> None:
    """Each route answers with this status and code, and names the field that holds the URL."""
    good, bad = (f"http://127.0.0.1:{web.port}{one}" for one in ("/good.png", path))
    for name, body, param in requests_for(bad):
        error = check_envelope(httpx2.post(f"{fetching.url}/{name}", json=body), status, code)
        assert error["param"] == param
    answer = httpx2.post(f"{fetching.url}/v1/classify", json={"images": [good, bad, good], "labels": ["red circle"]})
    assert check_envelope(answer, status, code)["param"] == "images.1"
    # Two that fail at once are one error still.
    answer = httpx2.post(f"{fetching.url}/v1/classify", json={"images": [bad, bad, bad], "labels": ["red circle"]})
    assert check_envelope(answer, status, code)["param"].startswith("images.")


def test_what_is_fetched_counts_like_a_body(web: Web, fetching: Endpoint) -> None:
    """A few bytes of URLs must not bring in gigabytes."""
    url = f"http://127.0.0.1:{web.port}/padded.png"
    for count, status in ((2, 200), (3, 413)):
        answer = httpx2.post(f"{fetching.url}/v1/classify", json={"images": [url] * count, "labels": ["red circle"]})
        assert answer.status_code == status, answer.text
    assert check_envelope(answer, 413, "body_too_large")["message"].startswith("the images behind the URLs")


def test_hostile_urls_are_refused_on_the_wire(fetching: Endpoint) -> None:
    allowed = ("http://127.0.0.1/", "http://127.0.0.1./", "https://127.0.0.1/")  # by this endpoint's config
    with httpx2.Client(base_url=fetching.url, timeout=30) as client:
        for url, _, _ in HOSTILE:
            if url in allowed or url.endswith(".example/"):
                continue  # names are the tests' own
            answer = client.post("v1/classify", json={**ASK, "image": url})
            assert 400 <= answer.status_code < 500, (url, answer.text)
            code = answer.json()["error"]["code"]
            assert code in CODES or code in ("invalid_image", "not_an_image"), (url, code)


def requests_for(image: str) -> list[tuple[str, dict[str, Any], str]]:
    """The paths that take images, a body with this one, and the field that it is in."""
    return [
        ("v1/classify", {**ASK, "image": image}, "image"),
        ("v1/classify", {"labels": ASK["labels"], "images": [image]}, "images.0"),
        ("v1/embeddings", {"model": "tiny", "input": [{"image": image}]}, "input.0"),
    ]


def encode_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
