"""Requests that are valid but for one or a few changes, on every route that reads a body, for tests of refusals."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from tests.support.endpoint import data_uri, shape_png

PNG = shape_png()
URI = data_uri(PNG)
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"model": "tiny", "input": ["a", URI], "encoding_format": "base64", "dimensions": 128}),
    ("/v1/embeddings", {"model": "tiny", "input": [{"text": "a"}, {"image": URI}], "modality": "auto", "user": "b"}),
    ("/v1/embeddings", {"model": "tiny", "input": [[1, 2], [3]], "truncate": True}),
    ("/v1/embeddings", {"model": "tiny", "input": [1, 2, 3]}),
    ("/embeddings", {"model": "tiny", "input": [URI], "modality": "image"}),
    (
        "/v1/embeddings",
        {
            "model": "tiny",
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": URI}}, {"type": "text", "text": "a"}],
                }
            ],
        },
    ),
    ("/v1/classify", {"image": URI, "labels": ["a", "b"], "templates": ["{label}", "a {label}"], "top_k": 1}),
    ("/v1/classify", {"images": [URI], "label_set": "shapes", "threshold": 0.5, "activation": "softmax"}),
    ("/v1/similarity", {"model": "tiny", "texts": ["a"], "images": [URI], "top_k": 1}),
    ("/v1/search", {"text": "red circle", "not": ["a"], "labels": ["red circle"], "top": 3, "cutoff": "none"}),
    ("/v1/search", {"image": URI, "fold": True, "thumbnails": True, "top": 2, "model": "tiny"}),
    ("/v1/search", {"like": "red circle/000000", "cutoff": "auto", "top": 1}),
    ("/v2/embed", {"model": "tiny", "texts": ["a"], "embedding_types": ["float", "int8"], "input_type": "image"}),
    ("/v2/embed", {"model": "tiny", "images": [URI], "truncate": "END", "output_dimension": 128}),
    (
        "/v2/embed",
        {
            "model": "tiny",
            "inputs": [
                {"content": [{"type": "text", "text": "a"}]},
                {"content": [{"type": "image_url", "image_url": {"url": URI}}]},
            ],
        },
    ),
    ("/", {"inputs": URI, "parameters": {"candidate_labels": ["a", "b"], "hypothesis_template": "a {}"}}),
    ("/", {"inputs": URI, "parameters": {"candidate_labels": "a, b"}, "options": {"wait_for_model": True}}),
    ("/", {"inputs": {"image": URI}, "parameters": {"candidate_labels": ["a"]}}),
    ("/", {"inputs": ["a", "b"], "normalize": True}),
    ("/embed", {"inputs": "a", "truncate": True, "dimensions": 128}),
    (
        "/v1/moderations",
        {"model": "tiny", "labels": ["a"], "input": [{"type": "image_url", "image_url": {"url": URI}}]},
    ),
]
FIELDS = [
    ("labels", "a"),
    ("labels", "b"),
    ("templates", "{label}"),
    ("label_set", "shapes"),
    ("top_k", "1"),
    ("threshold", "0.5"),
    ("activation", "softmax"),
    ("model", "tiny"),
    ("encoding_format", "float"),
    ("candidate_labels", "a,b"),
    ("hypothesis_template", "a {}"),
    ("dimensions", "128"),
    ("x", "y"),
]
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    2**70,
    -(2**70),
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    " ",
    "\0",
    "\ud800",
    "\ud83d\ude00",
    "\u202e",
    "x" * 300,
    "' OR 1=1 --",
    "a " * 5000 + "\ud800",
    "a " * 20_000,
    "{label}",
    "{",
    "{}{}",
    "{label.__class__}",
    "%s",
    ",",
    ", ,",
    "a,a",
    "data:",
    "data:,",
    "data:image/png;base64",
    "data:image/png;base64,",
    "data:image/png;base64,%%%",
    "data:;base64,=",
    "http://",
    "http://[::1",
    "http://127.0.0.1:99999999/",
    "http://127.0.0.1:0/",
    "http://127.0.0.1/\ud800",
    "https://\0/",
    "http://127.0.0.1\\@a/",
    "http:///x",
    "HTTP://0x7f.1/",
    "http://xn--\u2603/",
    "http://127.0.0.1/" + "a" * 9000,
    URI,
    URI[:200],
    URI[22:],
    URI + "!",
    "NaN",
    "1e999",
    "١",
    [],
    {},
    [[]],
    [{}],
    [None],
    [""],
    [URI],
    ["a", 1],
    [["a"]],
    {"": ""},
    {"a": {"b": {}}},
    {"url": ""},
    {"text": "a", "image": URI},
    {"type": "text"},
    ["a"] * 3000,
    "a," * 40_000,
    list(range(2000)),
    [-1],
    [10**30],
    "tiny:shapes",
    "shapes",
    "END",
    "NONE",
    "base64",
    "uint8",
]
TIMEOUTS = ("nan", "inf", "-1", "0", "1e-9", "1e999", "x", "", "٣", "9" * 5000)
TYPES = (
    "application/json; charset=utf-16",
    "application/x+json",
    "text/plain",
    "",
    "application",
    "a/b/c",
    ";",
    "image/png",
    "multipart/form-data",
    "multipart/form-data; boundary=",
    "multipart/form-data; boundary=b; charset=idna",
    "application/x-www-form-urlencoded",
    "application/json, application/json",
    "é/é",
)
METHODS = ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")
PATHS = (
    "/v1/models/%00",
    "/v1/models/%ff",
    "/v1/models/" + "a" * 3000,
    "/v1/models//",
    "/playground/%00",
    "/playground/..%2f",
    "/playground/" + "a" * 3000,
    "/playground/%ff",
    "/docs/ui/%00",
    "/docs/ui/%2e%2e/x",
    "//",
    "/%",
    "/v1/models/%d8%00",
    "/v1/label-sets?x=%ff",
    "/openapi.json?%00",
)


@dataclass
class NearValidRequest:
    """A request; `headers` and `body` are as they are sent."""

    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes


def make_requests(seed: int, count: int) -> Iterator[NearValidRequest]:
    """Yield `count` requests, the same for the same seed."""
    rng = random.Random(seed)
    kinds: list[Callable[[random.Random], NearValidRequest]] = [
        _make_json,
        _make_json,
        _make_json,
        _make_form,
        _make_image,
    ]
    for _ in range(count):
        request = rng.choice(kinds)(rng)
        if rng.random() < 0.3:
            _damage(request, rng)
        yield request


def _make_json(rng: random.Random) -> NearValidRequest:
    path, body = rng.choice(BODIES)
    tree = {"root": json.loads(json.dumps(body))}
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        _change(tree, rng)
    text = json.dumps(tree["root"], ensure_ascii=rng.random() < 0.7)
    return NearValidRequest(
        "POST", path, [(b"content-type", b"application/json")], text.encode("utf-8", "surrogatepass")
    )


def _change(tree: dict[str, Any], rng: random.Random) -> None:
    """Change one value or name somewhere in a tree of objects and lists."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any, depth: int) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)) and len(node[key]) < 100 and depth < 10:
                walk(node[key], depth + 1)

    walk(tree, 0)
    node, key = rng.choice(places)
    match rng.randrange(8):
        case 0 if key != "root":
            del node[key]
        case 1 if isinstance(node, dict) and key != "root":
            node[str(rng.choice(ODD))[:50]] = node.pop(key)
        case 2 if isinstance(node, dict) and key != "root":
            node[str(rng.choice(ODD))[:50]] = deepcopy(rng.choice(ODD))
        case 3:
            node[key] = [node[key]]
        case 4:
            for _ in range(rng.choice((3, 30, 200))):
                node[key] = [node[key]] if rng.random() < 0.5 else {"a": node[key]}
        case _:
            node[key] = deepcopy(rng.choice(ODD))


def _make_form(rng: random.Random) -> NearValidRequest:
    fields = [rng.choice(FIELDS) for _ in range(rng.randrange(5))]
    fields = [(name, str(rng.choice(ODD)) if rng.random() < 0.3 else value) for name, value in fields]
    parts = [_make_part(f'name="{name}"', value.encode("utf-8", "surrogatepass")) for name, value in fields]
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        head = rng.choice(
            (
                'name="image"; filename="a"',
                'name="images"; filename=""',
                "name=image; filename*=a",
                'name="x"; filename=a',
            )
        )
        parts.append(_make_part(head, rng.choice((PNG, PNG, PNG[:50], b"", b"x"))))
    rng.shuffle(parts)
    body = b"".join(parts) + rng.choice((b"--b--\r\n", b"--b--\r\n", b"--b--\r\n", b"--b\r\n", b""))
    path = rng.choice(
        ("/v1/classify", "/v1/embeddings", "/", "/v1/similarity", "/v2/embed", "/v1/moderations", "/v1/search")
    )
    return NearValidRequest("POST", path, [(b"content-type", b"multipart/form-data; boundary=b")], body)


def _make_part(head: str, value: bytes) -> bytes:
    return f"--b\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + value + b"\r\n"


def _make_image(rng: random.Random) -> NearValidRequest:
    fields = [rng.choice(FIELDS) for _ in range(rng.randrange(4))]
    query = "&".join(
        f"{name}={rng.choice(('%ff', '%00', '%', '', '+', '%ed%a0%80', '9' * 5000, value))}" for name, value in fields
    )
    path = rng.choice(("/v1/classify", "/v1/embeddings", "/", "/v2/embed"))
    body = rng.choice((PNG, PNG, PNG[:100], b"", b"GIF89a", PNG + b"x"))
    return NearValidRequest("POST", f"{path}?{query}", [(b"content-type", b"image/png")], body)


def _damage(request: NearValidRequest, rng: random.Random) -> None:
    """Change something of the request beside the body's values: its bytes, encoding, headers, method or path."""
    body = request.body
    match rng.randrange(12):
        case 0:
            request.body = body[: rng.randrange(len(body) + 1)]
        case 1 if body:
            place = rng.randrange(len(body))
            request.body = body[:place] + bytes([rng.randrange(256)]) + body[place + 1 :]
        case 2:
            request.body = body + rng.choice((b"\0", b"{}", b" ", body))
        case 3:
            request.body = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"[" * 900, b'{"a":' * 5000, b"\0")) + body
        case 4 | 5:
            packed = gzip.compress(body)
            half = len(body) // 2
            damaged = packed[: rng.randrange(len(packed))]
            several = gzip.compress(body[:half]) + gzip.compress(body[half:])
            request.body = rng.choice((packed, several, damaged, packed + b"x", body))
            request.headers.append(
                (b"content-encoding", rng.choice((b"gzip", b"gzip", b"x-gzip", b"br", b"gzip, gzip", b"")))
            )
        case 6 | 7:
            request.headers[0] = (b"content-type", rng.choice(TYPES).encode())
        case 8:
            request.headers.append((b"x-request-timeout-seconds", rng.choice(TIMEOUTS).encode()))
        case 9:
            name = rng.choice(
                (
                    b"x-request-id",
                    b"authorization",
                    b"x-api-key",
                    b"accept",
                    b"cookie",
                    b"forwarded",
                    b"range",
                    b"origin",
                )
            )
            request.headers.append(
                (name, rng.choice((b"", b"\xff", b"Bearer", b"Bearer \xe9", b"x" * 3000, b"bytes=0-")))
            )
        case 10:
            request.method = rng.choice(METHODS)
        case _:
            request.path = rng.choice(PATHS)
            request.method = rng.choice(("GET", "HEAD", "POST"))
