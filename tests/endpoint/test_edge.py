"""API keys, rate limits, fetching by URL, and parts that fail: the HTTP responses of the real application."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, cast

import httpx2
import psutil
import pytest
import uvicorn

from serve.admission.auth import REREAD_SECONDS, new_key
from serve.http.app import make_app
from serve.label_sets.files import LabelFiles
from sightline.demo.shapes import render
from storage.web.guard import CODES
from tests.quick.serve.test_fetch import HOSTILE, METADATA
from tests.support.endpoint import Endpoint, make_config, run_endpoint
from tests.support.images import encode
from tests.support.web_server import Respond, Web, drip, redirect, reply

IMAGE = encode(render("red circle", random.Random(1)))
REQUEST = {"labels": ["red circle", "blue square"], "image": "?"}


@contextlib.contextmanager
def serve_web(responses: dict[str, Respond]) -> Iterator[Web]:
    """Run a web server on loopback in a new thread until the `with` block ends. `responses` has one for each path."""
    web, started, loop = Web(responses), threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with web.run():
            started.set()
            await stop.wait()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.1)  # the connections have to close before the event loop does

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(60)
    try:
        yield web
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def check_envelope(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """Check that a response is OpenAI's error envelope with this status and code. Returns the error in it."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    return error


def test_keys_are_required_rotated_and_limited_in_rate(tmp_path: Path) -> None:
    (alice, first), (bob, second) = new_key("alice"), new_key("bob")
    (tmp_path / "keys").write_text(f"{first}\n{second}\n")
    auth = {"keys_file": str(tmp_path / "keys"), "requests_per_minute": 3}
    with run_endpoint(make_config(auth=auth)) as endpoint, httpx2.Client(base_url=endpoint.url) as client:
        body = {**REQUEST, "image": f"data:image/png;base64,{encode_base64(IMAGE)}"}

        def post(key: str) -> httpx2.Response:
            return client.post("v1/classify", json=body, headers={"authorization": f"Bearer {key}"})

        wrong = [b"Bearer", b"Bearer sl-wrong", b"Bearer \xe9", b"Basic " + alice.encode(), alice.encode()]
        for value in (None, *wrong, b"Bearer " + alice[:-1].encode()):
            response = client.post(
                "v1/classify", json=body, headers=[] if value is None else [(b"authorization", value)]
            )
            error = check_envelope(response, 401, "invalid_api_key")
            assert error["type"] == "authentication_error"
            assert response.headers["www-authenticate"] == "Bearer"
            assert alice[:-1] not in response.text
        for path in ("v1/models", "v1/label-sets", "v1/nowhere"):
            check_envelope(client.get(path), 401, "invalid_api_key")
        for path in ("", "playground/app.js", "healthz", "readyz", "openapi.json"):
            assert client.get(path).status_code == 200, path
        for remaining in (2, 1, 0):
            response = post(alice)
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "3"
            assert response.headers["x-ratelimit-remaining-requests"] == str(remaining)
            assert response.headers["x-ratelimit-reset-requests"].endswith("s")
        response = post(alice)
        error = check_envelope(response, 429, "rate_limit_exceeded")
        assert error["type"] == "rate_limit_error"
        assert 1 <= int(response.headers["retry-after"]) <= 20
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        assert post(bob).status_code == 200  # each key has its own rate limit
        # While the server runs, Alice's key is removed from the file and a key for Carol is added.
        carol, third = new_key("carol")
        (tmp_path / "keys").write_text(f"{second}\n{third}\n")
        threading.Event().wait(REREAD_SECONDS + 0.1)
        check_envelope(post(alice), 401, "invalid_api_key")
        assert post(carol).status_code == 200


def test_the_api_reference_says_which_routes_need_a_key(tmp_path: Path) -> None:
    """With it the page /docs has the button Authorize; without keys there is nothing to authorize."""
    alice, line = new_key("alice")
    (tmp_path / "keys").write_text(line)
    with run_endpoint(make_config(auth={"keys_file": str(tmp_path / "keys")})) as endpoint:
        schema = endpoint.client.get("/openapi.json").json()
        kinds = {name: scheme["type"] for name, scheme in schema["components"]["securitySchemes"].items()}
        assert kinds == {"bearer": "http", "x-api-key": "apiKey"}
        for path, item in schema["paths"].items():
            for method, operation in item.items():
                status = endpoint.client.request(method, path.replace("{id}", "tiny")).status_code
                assert (status == 401) == (operation.get("security") == [{name: []} for name in kinds]), (method, path)
        for headers in ({"authorization": f"Bearer {alice}"}, {"x-api-key": alice}):
            assert endpoint.client.get("/v1/models", headers=headers).status_code == 200
        assert endpoint.client.get("/ping").status_code == 200
    with run_endpoint(make_config()) as endpoint:
        schema = endpoint.client.get("/openapi.json").json()
    assert "securitySchemes" not in schema["components"]
    assert not any("security" in operation for item in schema["paths"].values() for operation in item.values())


def test_without_keys_only_loopback_clients_are_served() -> None:
    with run_endpoint(make_config()) as endpoint:
        assert httpx2.get(f"{endpoint.url}/v1/models").status_code == 200
        for headers in ({"host": "rebound.example"}, {"x-forwarded-for": "203.0.113.9"}):
            response = httpx2.get(f"{endpoint.url}/v1/models", headers=headers)
            assert check_envelope(response, 403, "loopback_only")["type"] == "permission_error"


def test_fetching_is_off_by_default() -> None:
    with run_endpoint(make_config()) as endpoint:
        for path, body, param in requests_for("http://example.org/a.jpg"):
            error = check_envelope(httpx2.post(f"{endpoint.url}/{path}", json=body), 400, "fetch_disabled")
            assert "fetch.enabled" in error["message"]
            assert error["param"] == param


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    responses = {
        "/good.png": reply(IMAGE, Content_Type="image/png"),
        "/hop": redirect("/good.png"),
        "/metadata": redirect(f"http://{METADATA}/latest/meta-data/"),
        "/text": reply(b"hello"),
        "/large": reply(b"x" * 200_000),
        "/slow": drip(b"x", 0.1, b"HTTP/1.1 200 OK\r\n\r\n"),
        "/missing": reply(b"", "404 Not Found"),
        "/padded.png": reply(IMAGE + b"\0" * 60_000),
    }
    with serve_web(responses) as running:
        yield running


@contextlib.contextmanager
def run_fetching(web: Web, max_seconds: float) -> Iterator[Endpoint]:
    """Run an endpoint that may fetch images from this web server, each within `max_seconds`."""
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
    with run_fetching(web, 60) as endpoint:  # a fetch on loopback takes less, also on a busy machine
        yield endpoint


def test_an_image_by_url_gives_the_same_numbers_as_the_same_image_inline(web: Web, fetching: Endpoint) -> None:
    inline = f"data:image/png;base64,{encode_base64(IMAGE)}"
    for path in ("/good.png", "/hop"):
        url = f"http://127.0.0.1:{web.port}{path}"
        for (name, by_url, _), (_, by_value, _) in zip(requests_for(url), requests_for(inline), strict=True):
            fetched, sent = (httpx2.post(f"{fetching.url}/{name}", json=body).json() for body in (by_url, by_value))
            assert fetched["data"] == sent["data"]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/metadata", 400, "fetch_forbidden"),
        ("/text", 400, "not_an_image"),
        ("/large", 413, "fetch_too_large"),
        ("/missing", 400, "fetch_failed"),
    ],
)
def test_the_error_of_a_refused_url_names_the_field_with_the_url(
    path: str, status: int, code: str, web: Web, fetching: Endpoint
) -> None:
    check_refused_url(path, status, code, web, fetching)


@pytest.mark.alone
def test_the_error_of_a_fetch_that_timed_out_names_the_field_with_the_url(web: Web) -> None:
    with run_fetching(web, 0.5) as endpoint:
        check_refused_url("/slow", 400, "fetch_timeout", web, endpoint)


def check_refused_url(path: str, status: int, code: str, web: Web, fetching: Endpoint) -> None:
    """Check that each route responds with this status and code, and names the field that holds the URL."""
    good, bad = (f"http://127.0.0.1:{web.port}{target}" for target in ("/good.png", path))
    for name, body, param in requests_for(bad):
        error = check_envelope(httpx2.post(f"{fetching.url}/{name}", json=body), status, code)
        assert error["param"] == param
    response = httpx2.post(f"{fetching.url}/v1/classify", json={"images": [good, bad, good], "labels": ["red circle"]})
    assert check_envelope(response, status, code)["param"] == "images.1"
    # Several fetches that fail in one request still give one error.
    response = httpx2.post(f"{fetching.url}/v1/classify", json={"images": [bad, bad, bad], "labels": ["red circle"]})
    assert check_envelope(response, status, code)["param"].startswith("images.")


def test_fetched_bytes_count_towards_the_limit_of_the_body(web: Web, fetching: Endpoint) -> None:
    """Otherwise a request of a few bytes, all of them URLs, could make the server read gigabytes."""
    url = f"http://127.0.0.1:{web.port}/padded.png"
    for count, status in ((2, 200), (3, 413)):
        response = httpx2.post(f"{fetching.url}/v1/classify", json={"images": [url] * count, "labels": ["red circle"]})
        assert response.status_code == status, response.text
    assert check_envelope(response, 413, "body_too_large")["message"].startswith("the images behind the URLs")


def test_hostile_urls_are_refused_with_a_documented_code(fetching: Endpoint) -> None:
    # The config of this endpoint allows 127.0.0.1.
    allowed = ("http://127.0.0.1/", "http://127.0.0.1./", "https://127.0.0.1/")
    with httpx2.Client(base_url=fetching.url, timeout=30) as client:
        for url, _, _ in HOSTILE:
            if url in allowed or url.endswith(".example/"):
                continue  # only the resolver of tests/quick/serve/test_fetch.py knows these host names
            response = client.post("v1/classify", json={**REQUEST, "image": url})
            assert 400 <= response.status_code < 500, (url, response.text)
            code = response.json()["error"]["code"]
            assert code in CODES or code in ("invalid_image", "not_an_image"), (url, code)


def requests_for(image: str) -> list[tuple[str, dict[str, Any], str]]:
    """For each kind of request with an image: the path, a body with this image, and the field that holds it."""
    return [
        ("v1/classify", {**REQUEST, "image": image}, "image"),
        ("v1/classify", {"labels": REQUEST["labels"], "images": [image]}, "images.0"),
        ("v1/embeddings", {"model": "tiny", "input": [{"image": image}]}, "input.0"),
    ]


def encode_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_background_tasks_survive_an_unexpected_exception(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Metrics stopped, and changed label sets were never read again, until the ingress was restarted."""
    for name in ("bad", "good"):
        (tmp_path / f"{name}.txt").write_text("cat\n")
    sets = {name: str(tmp_path / f"{name}.txt") for name in ("bad", "good")}
    with run_endpoint(make_config(label_sets=sets)) as endpoint:
        service = endpoint.service
        flush, changes, parse = service.metrics.flush, LabelFiles.list_changes, LabelFiles.parse
        failed: list[str] = []
        flushed = threading.Event()

        def fail_once(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def called(*values: Any) -> Any:
                if name not in failed:
                    failed.append(name)
                    raise KeyError(f"unexpected in {name}")
                flushed.set()
                return call(*values)

            return called

        def parse_good(files: LabelFiles, name: str) -> Any:
            if name == "bad":
                raise RecursionError("unexpected in a file")
            return parse(files, name)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.metrics, "flush", fail_once("flush", flush))
            patch.setattr(LabelFiles, "list_changes", fail_once("changes", changes))
            patch.setattr(LabelFiles, "parse", parse_good)
            for name in sets:
                (tmp_path / f"{name}.txt").write_text("cat\ndog\n")
            read = service.label_sets.registered
            wait_until(
                lambda: read["good"].embedded.names == ["cat", "dog"],
                "a bad file does not keep the others from being read",
            )
            assert flushed.wait(60)
        assert read["bad"].embedded.names == ["cat"]
        assert sorted(failed) == ["changes", "flush"]
        assert service._background.died == 2
        assert endpoint.client.get("/readyz").status_code == 200, "an ingress without them still answers correctly"
    messages = [record.getMessage() for record in caplog.records]
    assert "the task that passes metrics to Ray ended" in messages
    assert "the task that reads changed label sets ended" in messages
    assert "label set bad: its file changed and cannot be used: an unexpected error" in messages


def test_killed_decoders_cost_no_request() -> None:
    """The OOM killer, or an operator, kills a decoder or the server that starts them."""
    body = {**REQUEST, "image": f"data:image/png;base64,{encode_base64(IMAGE)}"}
    with run_endpoint(make_config()) as endpoint:
        [decoder] = endpoint.service.decoders._free
        before = endpoint.post("/v1/classify", body).json()["data"]
        for victim in ("decoder", "server"):
            pid = decoder.pid if victim == "decoder" else psutil.Process(decoder.pid).ppid()
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            response = endpoint.post("/v1/classify", body)
            assert response.status_code == 200, (victim, response.text)
            assert response.json()["data"] == before


@pytest.mark.parametrize("server", ["websockets-sansio", "wsproto"])
def test_a_websocket_is_refused_in_the_error_envelope(server: Any) -> None:
    """With each library for WebSockets that uvicorn may find."""
    app = make_app(make_config(), cast(Any, None), behind_haproxy=False)
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off", ws=server))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        thread.join(0.01)
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    port = running.servers[0].sockets[0].getsockname()[1]
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/v1/models", headers={**upgrade, "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="})
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
    finally:
        connection.close()
        running.should_exit = True
        thread.join(30)
    assert (response.status, error["code"]) == (404, "not_found")
    assert "no WebSockets" in error["message"]
