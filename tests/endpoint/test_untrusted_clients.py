"""Untrusted clients: a slow, greedy or hostile client does not delay or fail the requests of other clients."""

from __future__ import annotations

import base64
import gc
import gzip
import io
import itertools
import json
import logging
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from serve.admission.auth import new_key
from serve.options.table import EMBEDDING_OPTIONS
from tests.endpoint.test_edge import serve_web
from tests.support.endpoint import Endpoint, data_uri, make_config, run_endpoint, shape_png
from tests.support.searched_output import write_shapes
from tests.support.web_server import drip, reply

PNG = shape_png()
REQUEST = {"image": data_uri(PNG), "label_set": "shapes"}


@contextmanager
def run_with_two_keys(folder: Path, **changes: Any) -> Iterator[tuple[Endpoint, httpx.Client, httpx.Client]]:
    """Run an endpoint with two API keys. Yields the endpoint, a client with the key `greedy`, and one with `modest`."""
    (greedy, first), (modest, second) = new_key("greedy"), new_key("modest")
    (folder / "keys").write_text(f"{first}\n{second}\n")
    auth = {"keys_file": str(folder / "keys"), **changes.pop("auth", {})}
    with run_endpoint(make_config(auth=auth, **changes)) as endpoint:
        clients = [
            httpx.Client(base_url=endpoint.url, timeout=60, headers={"authorization": f"Bearer {key}"})
            for key in (greedy, modest)
        ]
        with clients[0], clients[1]:
            yield endpoint, clients[0], clients[1]


@contextmanager
def repeatedly(call: Callable[[], object], threads: int = 1) -> Iterator[None]:
    """Call `call` repeatedly, in one or several threads, until the `with` block ends."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            call()

    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in running:
            thread.join(60)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/", "/docs", "/openapi.json", "/playground/app.js"])
def test_the_body_of_a_request_without_a_key_is_not_read(path: str, tmp_path: Path) -> None:
    with run_with_two_keys(tmp_path) as (endpoint, _, modest):
        assert httpx.post(f"{endpoint.url}{path}", content=b"x" * 1000).status_code == 401
        host, port = endpoint.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as upload:
            upload.sendall(f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 1000000\r\n\r\n".encode())
            upload.sendall(b"x" * 100_000)
            time.sleep(0.2)
            assert endpoint.service.admission.in_flight.bytes == 0
            assert modest.post("/v1/classify", json=REQUEST).status_code == 200


def make_form(files: int) -> bytes:
    part = b'--b\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\nx\r\n'
    return part * files + b"--b--\r\n"


ECHO = "\r\n\x1b\u202e" + "x" * 1_000_000
"""A client's string that no response and no log line may repeat."""
ECHO_BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/classify", {"image": data_uri(PNG), "labels": ["a"], ECHO: 1}),
    ("/v1/classify", {"image": data_uri(PNG), "labels": ["a"], "model": ECHO}),
    ("/v1/classify", {"image": data_uri(PNG), "label_set": ECHO}),
    ("/v1/classify", {"image": data_uri(PNG), "labels": [ECHO]}),
    ("/v1/classify", {"image": data_uri(PNG), "labels": ["a"], "templates": [ECHO]}),
    ("/v1/classify", {"image": data_uri(PNG), "labels": ["a"], "activation": ECHO}),
    ("/v1/classify", {"image": data_uri(PNG), "labels": ["a"], "top_k": ECHO}),
    ("/v1/classify", {"image": ECHO, "labels": ["a"]}),
    ("/v1/classify", {"image": f"http://{ECHO}/", "labels": ["a"]}),
    ("/v1/classify", {"image": f"http://127.0.0.1/{ECHO}", "labels": ["a"]}),
    ("/v1/classify", {"image": f"data:{ECHO}", "labels": ["a"]}),
    ("/v1/similarity", {"images": [data_uri(PNG)], "texts": [ECHO]}),
    ("/v1/similarity", {"images": [data_uri(PNG)], "texts": ["a"], ECHO: {ECHO: ECHO}}),
    *(
        ("/v1/search", {"text": "a", **body})
        for body in ({"text": ECHO}, {"not": [ECHO]}, {"labels": [ECHO]}, {"like": ECHO}, {"image": ECHO}, {ECHO: 1})
    ),
    ("/v1/embeddings", {"model": ECHO, "input": "a"}),
    ("/v1/embeddings", {"model": "tiny", "input": [{ECHO: 1}]}),
    ("/v1/embeddings", {"model": "tiny", "input": "a", "encoding_format": ECHO}),
    ("/v1/embeddings", {"model": "tiny", "input": "a", "modality": ECHO}),
    ("/v1/embeddings", {"model": "tiny", "messages": [{"content": [{"type": ECHO}]}]}),
    ("/v2/embed", {"model": "tiny", "texts": ["a"], "embedding_types": [ECHO]}),
    ("/v2/embed", {"model": "tiny", "inputs": [{"content": [{"type": ECHO}]}]}),
    ("/", {"inputs": data_uri(PNG), "parameters": {"candidate_labels": ECHO}}),
    ("/", {"inputs": data_uri(PNG), "parameters": {"candidate_labels": ["a"], "hypothesis_template": ECHO}}),
    ("/embed", {"inputs": ["a"], "dimensions": ECHO}),
    ("/v1/moderations", {"model": ECHO, "input": data_uri(PNG)}),
    ("/v1/moderations", {"model": f"tiny:{ECHO}", "input": data_uri(PNG)}),
    ("/v1/moderations", {"labels": ["a"], "input": ECHO}),
]
for path in ("/v1/embeddings", "/v2/embed", "/embed"):
    field, value = {"/v1/embeddings": ("input", "a"), "/v2/embed": ("texts", ["a"]), "/embed": ("inputs", "a")}[path]
    # A shorter string, because there are many options.
    ECHO_BODIES += [(path, {"model": "tiny", field: value, option.name: ECHO[:5000]}) for option in EMBEDDING_OPTIONS]


def test_no_response_and_no_log_line_repeats_a_long_string(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """29 KB of gzip, an unknown field with a name of 30 million characters, were answered with 60 MB."""
    form = b'--b\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\nx\r\n--b--\r\n'
    name = b"x" * 8000
    requests: list[tuple[str, dict[str, str], bytes]] = [
        (path, {"content-type": "application/json"}, json.dumps(body).encode()) for path, body in ECHO_BODIES
    ]
    requests += [
        ("/v1/classify", {"content-type": "multipart/form-data; boundary=b"}, form % (name, b"")),
        ("/v1/classify", {"content-type": "multipart/form-data; boundary=b"}, form % (name, b'; filename="a"')),
        (
            "/v1/classify",
            {"content-type": "multipart/form-data; boundary=b"},
            form % (b"image", b'; filename="%s"' % name),
        ),
        ("/v1/classify", {"content-type": "y" * 8000}, b"{}"),
        ("/v1/classify?" + "y" * 8000 + "=1", {"content-type": "image/png"}, PNG),
        ("/v1/" + "y" * 8000, {"content-type": "application/json"}, b"{}"),
    ]
    searched = write_shapes(tmp_path / "tags")
    with (
        run_endpoint(make_config(fetch={"enabled": True}, search={"output": searched.uri})) as endpoint,
        caplog.at_level("INFO", "ray.serve.sightline"),
    ):
        for path, headers, body in requests:
            caplog.clear()
            packed = {**headers, "content-encoding": "gzip", "x-request-id": "z" * 8000}
            response = endpoint.client.post(path, content=gzip.compress(body), headers=packed)
            where = (path[:20], body[:200])
            assert response.status_code < 500, where
            assert b"x" * 250 not in response.content, where
            if response.status_code == 200:  # an option without effect may have any value
                continue
            assert len(response.content) < 2000, where
            assert sum(len(name) + len(value) for name, value in response.headers.items()) < 2000, where
            assert not any(char in response.json()["error"]["message"] for char in "\r\n\x1b\u202e"), where
            for record in caplog.records:
                line = logging.Formatter("%(message)s").format(record)
                assert len(line) + sum(len(str(value)) for value in record.__dict__.values()) < 10_000, where
        for header in (
            (b"content-encoding", b"y" * 8000),
            (b"x-request-id", b"a\x80"),
            (b"host", b"127.0.0.1:" + b"1" * 8000),
        ):
            response = endpoint.client.post("/v1/classify", content=b"{}", headers=[header])
            assert 400 <= response.status_code < 500
            assert len(response.content) < 2000
        caplog.clear()
        response = endpoint.client.request("x" * 8000, "/v1/classify")
        assert response.status_code in (400, 405)  # the HTTP parser may refuse it
        assert all(len(record.getMessage()) < 200 for record in caplog.records)


HOSTILE_BODIES: dict[str, tuple[str, str, bytes]] = {
    "empty objects": ("/v1/embeddings", "application/json",
                      b'{"model": "tiny", "input": [' + b"{}," * 340_000 + b"{}]}"),
    "fewer empty objects": ("/v1/embeddings", "application/json",
                            b'{"model": "tiny", "input": [' + b"{}," * 90_000 + b"{}]}"),
    "token ids": ("/v1/embeddings", "application/json", b'{"model": "tiny", "input": [' + b"1," * 1_000_000 + b"1]}"),
    "lists of token ids": ("/v1/embeddings", "application/json",
                           b'{"model": "tiny", "input": [' + b"[1]," * 90_000 + b"[1]]}"),
    "empty texts": ("/v1/embeddings", "application/json", b'{"model": "tiny", "input": [' + b'"",' * 199_000 + b'""]}'),
    "messages": ("/v1/embeddings", "application/json", b'{"model": "tiny", "messages": [' + b"{}," * 90_000 + b"{}]}"),
    "depth": ("/v1/embeddings", "application/json", b'{"model": "tiny", "input": ' + b"[" * 190_000),
    "labels": ("/v1/classify", "application/json", b'{"image": "a", "labels": [' + b"1," * 190_000 + b"1]}"),
    "unknown fields": ("/v1/classify", "application/json",
                       b"{" + b",".join(b'"%d": 1' % n for n in range(150_000)) + b"}"),
    "Hugging Face's": ("/", "application/json", b'{"inputs": [' + b"1," * 190_000 + b"1]}"),
    "Cohere's": ("/v2/embed", "application/json", b'{"model": "tiny", "inputs": [' + b"{}," * 90_000 + b"{}]}"),
    "30,000 files": ("/v1/classify", "multipart/form-data; boundary=b", make_form(30_000)),
    "1,000 files": ("/v1/classify", "multipart/form-data; boundary=b", make_form(1_000)),
}  # fmt: skip


@pytest.mark.alone
def test_a_small_invalid_body_is_refused_within_a_second() -> None:
    """The limits are checked by scanning the bytes. Parsing such a body first took seconds and gigabytes of memory.

    The test measures CPU time, because other processes and threads that other tests left take wall-clock time too.
    """
    gc.collect()
    gc.freeze()
    with run_endpoint(make_config()) as endpoint:
        for name, (path, kind, body) in HOSTILE_BODIES.items():
            start = time.process_time()
            response = endpoint.client.post(path, content=body, headers={"content-type": kind})
            took = time.process_time() - start
            assert 400 <= response.status_code < 500, (name, response.text)
            assert len(response.content) < 2000
            assert took < 1, (name, took)
        assert endpoint.post("/v1/classify", REQUEST).status_code == 200


@pytest.mark.alone
def test_slow_uploads_and_bad_images_do_not_lengthen_the_estimated_wait() -> None:
    """Admission counts neither the time of an upload nor a refused request as work of the model."""
    bad = {"image": base64.b64encode(b"GIF89a").decode(), "label_set": "shapes"}
    with run_endpoint(make_config()) as endpoint:
        host, port = endpoint.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as upload:
            upload.sendall(f"POST /v1/classify HTTP/1.1\r\nhost: {host}\r\ncontent-length: 999\r\n\r\n{{".encode())
            for _ in range(24):
                time.sleep(0.25)
                assert endpoint.post("/v1/classify", bad).status_code == 400
            endpoint.post("/v1/classify", REQUEST)
            quick = endpoint.post("/v1/classify", REQUEST, headers={"x-request-timeout-seconds": "2"})
            assert quick.status_code == 200, quick.text


def make_bomb(side: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "WEBP", lossless=True)
    assert len(buffer.getvalue()) < 3000
    return data_uri(buffer.getvalue(), "image/webp")


@pytest.mark.alone
def test_decompression_bombs_are_refused_and_do_not_delay_other_keys(tmp_path: Path) -> None:
    with run_with_two_keys(tmp_path) as (endpoint, greedy, modest):
        large = greedy.post("/v1/classify", json={**REQUEST, "image": make_bomb(8000)})
        assert (large.status_code, large.json()["error"]["code"]) == (400, "too_many_pixels")
        request = {"images": [make_bomb(4900)] * 64, "label_set": "shapes"}
        responses: list[httpx.Response] = []
        with repeatedly(lambda: responses.append(greedy.post("/v1/classify", json=request))):
            time.sleep(1)
            start = time.perf_counter()
            assert modest.post("/v1/classify", json=REQUEST).status_code == 200
            assert time.perf_counter() - start < 15
        for response in responses:
            assert (response.status_code, response.json()["error"]["code"]) == (400, "too_many_pixels_together")
        one = modest.post("/v1/classify", json={**REQUEST, "image": make_bomb(4900)})
        assert one.status_code == 200, "a single image of 24 megapixels is allowed"
        assert endpoint.service.admission.in_flight.items == 0


def slow_down(endpoint: Endpoint, seconds: float) -> list[int]:
    """Make the model take `seconds` longer for a batch of images. Returns a list that gets the size of each batch."""
    encoder, batches = endpoint.model.actor.encoder, []
    forward = encoder._forward

    def slow(pixels: Any) -> Any:
        batches.append(len(pixels))
        time.sleep(seconds)
        return forward(pixels)

    encoder._forward = slow
    return batches


@pytest.mark.alone
def test_a_key_with_many_queued_images_does_not_delay_another_key(tmp_path: Path) -> None:
    request = {"images": [data_uri(PNG)] * 64, "label_set": "shapes"}
    with run_with_two_keys(tmp_path) as (endpoint, greedy, modest):
        batches = slow_down(endpoint, 0.1)
        batches_waited: list[int] = []
        with repeatedly(lambda: greedy.post("/v1/classify", json=request), threads=4):
            time.sleep(1.5)
            for _ in range(7):
                before = len(batches)
                assert modest.post("/v1/classify", json=REQUEST).status_code == 200
                batches_waited.append(len(batches) - before)
        # 256 images, which are 16 batches, are queued. The image of the other key is in about the third batch.
        assert statistics.median(batches_waited) < 6, batches_waited


@pytest.mark.alone
def test_the_quota_of_a_key_counts_images_and_texts(tmp_path: Path) -> None:
    with run_with_two_keys(tmp_path, auth={"items_per_minute": 10}) as (_, greedy, modest):
        images = {"images": [data_uri(PNG)] * 6, "label_set": "shapes"}
        first = greedy.post("/v1/classify", json=images)
        assert (first.status_code, first.headers["x-ratelimit-remaining-items"]) == (200, "4")
        second = greedy.post("/v1/classify", json=images)
        assert (second.status_code, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(second.headers["retry-after"]) <= 13
        texts = greedy.post("/v1/embeddings", json={"model": "tiny", "input": ["a", "b", "c", "d"]})
        assert (texts.status_code, texts.headers["x-ratelimit-remaining-items"]) == (200, "0")
        assert modest.post("/v1/classify", json=images).status_code == 200


@pytest.mark.alone
def test_a_large_label_set_succeeds_after_several_requests_with_short_deadlines() -> None:
    """Prompts embedded before the deadline stay in the cache, so that a retry and other label sets use them."""
    with run_endpoint(make_config()) as endpoint:
        encoder, texts = endpoint.model.actor.encoder, []
        embed = encoder.embed_and_read

        def slow(prompts: list[str]) -> Any:
            time.sleep(0.3)
            texts.extend(prompts)
            return embed(prompts)

        encoder.embed_and_read = slow  # type: ignore[method-assign, assignment]
        labels = [f"number {n}" for n in range(600)]
        short_deadline = {"x-request-timeout-seconds": "1.5"}
        attempts = 0
        while attempts < 10:
            attempts += 1
            response = endpoint.post(
                "/v1/classify", {"image": REQUEST["image"], "labels": labels}, headers=short_deadline
            )
            if response.status_code == 200:
                break
            assert response.json()["error"]["code"] in ("deadline_exceeded", "overloaded"), response.text
            time.sleep(0.2)
        assert response.status_code == 200
        assert attempts > 1
        assert len(texts) == len(set(texts)) == 600, "no prompt may be embedded twice"
        overlapping = {"image": REQUEST["image"], "labels": [*labels[:100], "a new one"]}
        assert 0 < endpoint.post("/v1/classify", overlapping).json()["usage"]["prompt_tokens"] <= 16


@pytest.mark.alone
def test_slow_fetches_of_one_key_do_not_delay_another_key(tmp_path: Path) -> None:
    responses = {
        "/good.png": reply(PNG, Content_Type="image/png"),
        "/tarpit": drip(b"x", 0.2, b"HTTP/1.1 200 OK\r\n\r\n"),
    }
    with serve_web(responses) as web:
        fetch = {"enabled": True, "ports": [web.port], "allowed_networks": ["127.0.0.1/32"], "max_seconds": 8}
        with run_with_two_keys(tmp_path, fetch=fetch) as (_, greedy, modest):
            url = f"http://127.0.0.1:{web.port}"
            tarpits = {"images": [f"{url}/tarpit"] * 64, "label_set": "shapes"}
            with repeatedly(lambda: greedy.post("/v1/classify", json=tarpits), threads=8):
                time.sleep(1)
                start = time.perf_counter()
                response = modest.post("/v1/classify", json={**REQUEST, "image": f"{url}/good.png"})
                took = time.perf_counter() - start
            assert response.status_code == 200, response.text
            assert took < 5, "the fetch must not wait for the slow fetches, which end after 8 s"


# Python's garbage collector may find the aborted connections only later, and then warns about them.
@pytest.mark.alone
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_fetched_bytes_count_towards_the_limit_while_they_arrive(tmp_path: Path) -> None:
    """Sixteen endless responses, each below the limit of one fetch, are stopped by the limit of a request."""
    flood = drip(b"x" * 65536, 0.01, b"HTTP/1.1 200 OK\r\n\r\n")
    with serve_web({"/flood": flood}) as web:
        fetch = {"enabled": True, "ports": [web.port], "allowed_networks": ["127.0.0.1/32"], "max_seconds": 20}
        with run_endpoint(make_config(fetch=fetch, limits={"body_bytes": 2_000_000})) as endpoint:
            start = time.perf_counter()
            images = [f"http://127.0.0.1:{web.port}/flood"] * 16
            response = endpoint.post("/v1/classify", {"images": images, "label_set": "shapes"})
            assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
            assert time.perf_counter() - start < 10, "the fetches must stop before one of them reaches its own limit"


def test_the_reason_for_a_refused_fetch_is_in_the_endpoints_log(caplog: pytest.LogCaptureFixture) -> None:
    fetch = {"enabled": True}
    with run_endpoint(make_config(fetch=fetch)) as endpoint, caplog.at_level("INFO", "ray.serve.sightline"):
        response = endpoint.post("/v1/classify", {**REQUEST, "image": "http://127.0.0.1/"})
        assert response.json()["error"]["code"] == "fetch_forbidden"
    [record] = [entry for entry in caplog.records if "was not fetched" in entry.getMessage()]
    assert record.name == "ray.serve.sightline"
    assert "loopback" in record.getMessage()


def stop_refilling(endpoint: Endpoint) -> None:
    """Stop the clock of the limit of items a minute."""
    rates = endpoint.service.embedder._rates
    assert rates is not None
    rates._clock = lambda: 0.0


def test_prompts_of_labels_count_for_the_rate_limit_also_if_they_are_cached(tmp_path: Path) -> None:
    with run_with_two_keys(tmp_path, auth={"items_per_minute": 1000}) as (endpoint, greedy, _):
        stop_refilling(endpoint)
        remaining = []
        for _ in range(3):
            response = greedy.post(
                "/v1/classify", json={"image": REQUEST["image"], "labels": [f"l {n}" for n in range(9)]}
            )
            assert response.status_code == 200
            remaining.append(int(response.headers["x-ratelimit-remaining-items"]))
        assert [before - after for before, after in itertools.pairwise(remaining)] == [10, 10]


def test_labels_of_a_response_count_for_the_rate_limit_by_the_thousand(tmp_path: Path) -> None:
    many = {"names": [f"label {n}" for n in range(2500)], "threshold": 0.0, "top_k": None}
    with run_with_two_keys(tmp_path, auth={"items_per_minute": 1000}, label_sets={"many": many}) as (
        endpoint,
        greedy,
        _,
    ):
        stop_refilling(endpoint)
        response = greedy.post("/v1/classify", json={"images": [REQUEST["image"]] * 2, "label_set": "many"})
        assert response.status_code == 200
        assert int(response.headers["x-ratelimit-remaining-items"]) == 1000 - 2 - 5


def test_a_refused_request_is_charged_for_the_work_that_was_begun(tmp_path: Path) -> None:
    bad, good, pixels = data_uri(PNG[:60]), data_uri(PNG), data_uri(shape_png(seed=2))
    long = "a photo of a red circle " * 40
    with run_with_two_keys(tmp_path, auth={"items_per_minute": 1000}) as (endpoint, greedy, _):
        stop_refilling(endpoint)

        def cost(path: str, body: dict[str, Any], code: str, **headers: str) -> int:
            before = int(greedy.post("/embed", json={"inputs": "a"}).headers["x-ratelimit-remaining-items"])
            response = greedy.post(path, json=body, headers=headers)
            assert response.json()["error"]["code"] == code, response.text
            after = int(greedy.post("/embed", json={"inputs": "a"}).headers["x-ratelimit-remaining-items"])
            if "x-ratelimit-remaining-items" in response.headers:
                assert int(response.headers["x-ratelimit-remaining-items"]) == after + 1
            return before - 1 - after

        # Decoded: one image. The others of its request are not.
        assert cost("/v1/classify", {"images": [bad, *[good] * 9], "label_set": "shapes"}, "truncated") <= 4
        assert cost("/v1/classify", {"images": [bad], "label_set": "shapes"}, "truncated") == 1
        # Embedded: the texts, of which one turns out to be too long.
        body = {"model": "tiny", "input": ["a", "b", long], "truncate": False}
        assert cost("/v1/embeddings", body, "text_too_long") == 3
        # Embedded: the prompts of labels that turn out to be unreadable. The images are not decoded.
        assert cost("/v1/classify", {"images": [good, pixels], "labels": ["红", "blue"]}, "invalid_request") in (2, 3)
        assert cost("/v1/classify", {"images": [good] * 65, "label_set": "shapes"}, "too_many_images") == 0
        # Embedded: the batches that the model got before the deadline. Their items are 64 each.
        encoder = endpoint.model.actor.encoder
        embed = encoder.embed_and_read

        def slow(texts: list[str]) -> Any:
            time.sleep(0.5 if len(texts) > 1 else 0)
            return embed(texts)

        encoder.embed_and_read = slow  # type: ignore[method-assign, assignment]
        body = {"model": "tiny", "input": [f"number {n}" for n in range(900)]}
        hurry = {"X-Request-Timeout-Seconds": "0.4"}
        assert 64 <= cost("/v1/embeddings", body, "deadline_exceeded", **hurry) <= 4 * 64
