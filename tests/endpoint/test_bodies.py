"""Bodies and methods: nothing of a request is dropped or guessed, and a refusal says what is wrong."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve.http.bodies.uploads import _read_query
from serve.http.middleware.gzip_body import MAX_MEMBERS
from serve.http.validation import _list_models
from serve.schemas import RequestModel, ResponseModel
from tests.support.endpoint import Endpoint, data_uri, make_config, run_endpoint, shape_png

PNG = shape_png()
TEXT = {"model": "tiny", "input": "a red circle"}
BODY = json.dumps(TEXT).encode()
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with run_endpoint(make_config(limits={"body_bytes": 2_000_000})) as running:
        yield running


def refusal(response: httpx.Response, status: int = 400) -> str:
    """The message of a refusal with this status."""
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


WRONG_JSON = {
    "invalid UTF-8": (b'{"model": "tiny", "input": "caf\xe9"}', "it is not UTF-8: byte 31 cannot be read"),
    "UTF-16": (json.dumps(TEXT).encode("utf-16"), "it is not UTF-8: byte 0"),
    "a million digits": (b'{"model": "tiny", "input": "a", "n": 1' + b"0" * 1_000_000 + b"}", "100 digits"),
    "depth": (b'{"model": "tiny", "input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "NaN": (b'{"model": "tiny", "input": "a", "x": NaN}', "NaN is not a number of JSON"),
    "Infinity": (b'{"model": "tiny", "input": "a", "x": [-Infinity]}', "-Infinity is not a number of JSON"),
    "not JSON": (b'{"model": tiny}', "Expecting value (line 1, column 11)"),
    "two values": (BODY + BODY, "Extra data"),
    "empty": (b" ", "Expecting value"),
}


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/similarity"], ids=["body read by us", "by FastAPI"])
@pytest.mark.parametrize("name", WRONG_JSON)
def test_a_body_that_is_not_json_is_told_what_is_wrong(name: str, path: str, endpoint: Endpoint) -> None:
    body, why = WRONG_JSON[name]
    response = endpoint.client.post(path, content=body, headers=JSON)
    assert why in refusal(response)
    assert response.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/similarity", "/v2/embed", "/embed", "/"])
def test_a_field_that_stands_twice_is_refused(path: str, endpoint: Endpoint) -> None:
    """The last one won, and the client did not know."""
    for body, name in (
        (b'{"model": "other", "input": "a", "inputs": "a", "model": "tiny"}', "model"),
        (b'{"model": "tiny", "input": {"text": "a", "text": "b"}}', "text"),
    ):
        response = endpoint.client.post(path, content=body, headers=JSON)
        assert refusal(response) == f"{name}: the field stands twice: send it once"
        assert response.json()["error"]["param"] == name


def test_a_byte_order_mark_is_no_part_of_the_body(endpoint: Endpoint) -> None:
    plain = endpoint.client.post("/v1/embeddings", content=BODY, headers=JSON)
    marked = endpoint.client.post("/v1/embeddings", content=b"\xef\xbb\xbf" + BODY, headers=JSON)
    assert (plain.status_code, marked.status_code) == (200, 200)
    assert plain.json()["data"] == marked.json()["data"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v2/embed", {"model": "tiny", "texts": ["a", "a " * 9000 + "\ud800"]}, "texts.1"),
        ("/v1/embeddings", {**TEXT, "user": {"\udc00": 1}}, "user"),
        ("/v1/embeddings", {**TEXT, "\ud800": 1}, None),
        ("/v1/similarity", {"texts": ["\ud83d"], "images": []}, "texts.0"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_wherever_it_stands(
    path: str, body: dict[str, Any], param: str | None, endpoint: Endpoint
) -> None:
    """Behind the part of a text that the model reads it caused status 500, because Cohere's responses repeat texts."""
    response = endpoint.client.post(path, content=json.dumps(body), headers=JSON)
    assert refusal(response) == f"{param or 'body'}: half of a surrogate pair is not valid text"
    assert response.json()["error"]["param"] == param


def test_a_whole_surrogate_pair_is_a_character(endpoint: Endpoint) -> None:
    body = json.dumps({"model": "tiny", "texts": ["a \N{CAT}", "\\ud800"]})
    assert "\\ud83d\\udc08" in body
    response = endpoint.client.post("/v2/embed", content=body, headers=JSON)
    assert response.status_code == 200, response.text
    assert response.json()["texts"] == ["a \N{CAT}", "\\ud800"]


def send_packed(endpoint: Endpoint, content: Any) -> httpx.Response:
    """Send a gzip body: bytes, or an iterator of pieces, which are sent in chunks."""
    return endpoint.client.post("/v1/embeddings", content=content, headers={**JSON, "content-encoding": "gzip"})


def test_all_members_of_a_gzip_body_are_read(endpoint: Endpoint) -> None:
    """Everything after the first one was dropped: half a body is often valid, such as a form or a shorter list."""
    members = gzip.compress(BODY[:10]) + gzip.compress(b"") + gzip.compress(BODY[10:])
    whole = endpoint.client.post("/v1/embeddings", content=BODY, headers=JSON).json()["data"]
    assert send_packed(endpoint, members).json()["data"] == whole
    assert send_packed(endpoint, (members[n : n + 1] for n in range(len(members)))).json()["data"] == whole
    assert "Extra data" in refusal(send_packed(endpoint, gzip.compress(BODY) + gzip.compress(b"{}")))


def test_bytes_after_the_last_gzip_member_are_refused(endpoint: Endpoint) -> None:
    packed = gzip.compress(BODY)
    for rest in (b"\0", b"\0" * 100, b"{}", b"\x1f", b"\x1f\x8c"):
        assert "other bytes after its gzip" in refusal(send_packed(endpoint, packed + rest))
    for part in (packed[:-1], packed + packed[:-1], packed + packed[:2], b"", b"\x1f\x8b"):
        assert "ends early" in refusal(send_packed(endpoint, part))
    assert "not gzip" in refusal(send_packed(endpoint, BODY))
    assert "damaged" in refusal(send_packed(endpoint, packed[:-6] + b"\xff" + packed[-5:]))


def test_a_gzip_body_that_unpacks_to_nothing_is_bounded(endpoint: Endpoint) -> None:
    members = gzip.compress(b"") * (MAX_MEMBERS + 1)
    assert f"more than {MAX_MEMBERS} members" in refusal(send_packed(endpoint, members))
    packer = zlib.compressobj(wbits=31)
    nothing = packer.compress(b"") + b"\0\0\0\xff\xff" * 500_000
    assert "has more than 2000000 bytes" in refusal(send_packed(endpoint, iter([nothing])), 413)
    header = [(b"content-type", b"application/json"), (b"content-encoding", b"gzip"), (b"content-encoding", b"gzip")]
    response = endpoint.client.post("/v1/embeddings", content=gzip.compress(BODY), headers=header)
    assert "not 'gzip, gzip'" in refusal(response, 415)


def make_form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    """A form of parts, each with the parameters and further headers of its Content-Disposition."""
    return (
        b"".join(
            b"--b\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + value + b"\r\n"
            for head, value in parts
        )
        + end
    )


IMAGE = ('name="image"; filename="a.png"', PNG)
LABEL = ('name="labels"', b"red circle")
WRONG_FORMS = {
    "it ends early": (
        make_form(IMAGE, LABEL, ('name="labels"', b"blue star"), end=b""),
        "ends before the last boundary",
    ),
    "it ends within the boundary": (make_form(IMAGE, LABEL, end=b"--b-"), "ends before the last boundary"),
    "empty": (b"", "ends before the last boundary"),
    "a label is not UTF-8": (make_form(IMAGE, ('name="labels"', b"caf\xe9")), "labels is not valid utf-8: send UTF-8"),
    "a name is not UTF-8": (make_form(IMAGE, ('name="labels"', b"a"), ('name="x"', b"\xff")), "x is not valid utf-8"),
    "base64": (
        make_form(IMAGE, ('name="labels"\r\nContent-Transfer-Encoding: base64', b"cmVkIGNpcmNsZQ==")),
        "labels has the Content-Transfer-Encoding 'base64'",
    ),
    "an unknown charset": (
        make_form(IMAGE, ('name="labels"\r\nContent-Type: text/plain; charset=undefined', b"a")),
        "labels has the charset 'undefined'",
    ),
    "no name": (make_form(IMAGE, ("", b"a")), "a part has no name"),
    "twice": (make_form(IMAGE, LABEL, ('name="top_k"', b"1"), ('name="top_k"', b"2")), "top_k: the field stands twice"),
    "a file as a label": (make_form(IMAGE, ('name="labels"; filename="a"', b"a")), "labels: a file where a value"),
    "a value as an image": (make_form(LABEL, ('name="image"', b"a")), "image: a value where a file is expected"),
    "no image": (make_form(LABEL), "image: send at least one file"),
    "not a form": (b"x" * 100, "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG_FORMS)
def test_a_wrong_form_is_refused_with_the_reason(name: str, endpoint: Endpoint) -> None:
    body, why = WRONG_FORMS[name]
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert why in refusal(endpoint.client.post("/v1/classify", content=body, headers=headers))


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "b" * 300,
        "multipart/form-data; boundary=b; charset=undefined",
        "multipart/form-data; boundary=b; charset=idna",
        'multipart/form-data; boundary="b',
    ],
)
def test_a_form_with_a_wrong_content_type_is_refused(kind: str, endpoint: Endpoint) -> None:
    """A boundary that is too long, and charsets that raise other errors than those of text, caused status 500."""
    body = make_form(IMAGE, ('name="labels"', b"caf\xe9"))
    assert "cannot be read" in refusal(
        endpoint.client.post("/v1/classify", content=body, headers={"content-type": kind})
    )


def labels_of(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return sorted(label["label"] for label in response.json()["data"][0]["labels"])


def test_labels_of_forms_and_queries_arrive_as_they_were_sent(endpoint: Endpoint) -> None:
    latin = make_form(IMAGE, LABEL, ('name="labels"\r\nContent-Type: text/plain; charset=ISO-8859-1', b"caf\xe9"))
    headers = {"content-type": "multipart/form-data; boundary=b"}
    png = {"content-type": "image/png"}
    assert labels_of(endpoint.client.post("/v1/classify", content=latin, headers=headers)) == ["café", "red circle"]
    large = make_form(
        IMAGE, ('name="labels"', "café".encode()), ('name="images"; filename="b"', PNG + bytes(1_500_000))
    )
    response = endpoint.client.post("/v1/classify", content=large, headers=headers)
    assert labels_of(response) == ["café"]
    assert len(response.json()["data"]) == 2
    assert _read_query("labels=café&labels=a%20b".encode()) == [("labels", "café"), ("labels", "a b")]
    response = endpoint.client.post("/v1/classify?labels=caf%C3%A9&labels=a+b", content=PNG, headers=png)
    assert labels_of(response) == ["a b", "café"]
    for query, why in (
        ("labels=caf%E9", "not valid UTF-8"),
        ("labels=a&top_k=1&top_k=2", "top_k: the field stands twice"),
    ):
        response = endpoint.client.post(f"/v1/classify?{query}", content=PNG, headers=png)
        assert why in refusal(response)


def test_labels_as_one_long_string_are_refused(endpoint: Endpoint) -> None:
    """More names than any list may have were a pydantic error outside of the body's own model."""
    names = ",".join(f"label {n}" for n in range(40_000))
    response = endpoint.post("/", {"inputs": data_uri(PNG), "parameters": {"candidate_labels": names}})
    assert "at most" in refusal(response)
    response = endpoint.client.post(
        "/",
        params={"hypothesis_template": "x" * 2000, "candidate_labels": "a"},
        content=PNG,
        headers={"content-type": "image/png"},
    )
    assert response.status_code == 400


def test_a_validation_error_is_the_clients_only_in_a_model_of_requests() -> None:
    requests = {model.__name__ for model in _list_models(RequestModel)}
    responses = {model.__name__ for model in _list_models(ResponseModel)}
    assert len(requests) > 10
    assert len(responses) > 5
    assert not requests & responses


READ = ("/", "/docs", "/openapi.json", "/playground/app.js", "/healthz", "/readyz", "/health", "/ping", "/info",
        "/v1/models", "/models", "/v1/models/tiny", "/v1/label-sets")  # fmt: skip


@pytest.mark.parametrize("path", READ)
def test_head_works_wherever_get_does(path: str, endpoint: Endpoint) -> None:
    read, head = endpoint.client.get(path), endpoint.client.head(path)
    assert (read.status_code, head.status_code) == (200, 200)
    assert head.content == b""
    for name in ("content-length", "content-type", "x-sightline-model"):
        assert head.headers[name] == read.headers[name], name


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("DELETE", "/", "GET, HEAD, POST"),
        ("GET", "/v1/classify", "POST"),
        ("HEAD", "/v1/classify", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("PUT", "/v1/models/a/b", "GET, HEAD"),
        ("POST", "/playground/app.js", "GET, HEAD"),
        ("POST", "/docs/ui/index.css", "GET, HEAD"),
        ("OPTIONS", "/v1/embeddings", "POST"),
        ("POST", "/ping", "GET, HEAD"),
    ],
)
def test_a_method_that_is_not_allowed_is_told_which_ones_are(
    method: str, path: str, allow: str, endpoint: Endpoint
) -> None:
    response = endpoint.client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allow)
    if method != "HEAD":
        assert refusal(response, 405) == f"this path allows {allow}, not {method}"
