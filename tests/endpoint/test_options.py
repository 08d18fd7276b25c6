"""What a client asks is done or refused: images in the fields of texts, and options that change the response."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from serve.options.table import EMBEDDING_OPTIONS, describe_options
from tests.support.endpoint import Endpoint, data_uri, make_config, run_endpoint, shape_png

PNG = shape_png("blue star")
URI = data_uri(PNG)
PLAIN = base64.b64encode(PNG).decode()
IMAGE_URL = "https://example.com/cat.jpg?size=2"
LONG = "a photo of a red circle " * 40
LABELS = ["red circle", "blue star", "green ring"]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with run_endpoint(make_config()) as running:
        yield running


@pytest.fixture(scope="module")
def image(endpoint: Endpoint) -> np.ndarray:
    body = {"model": "tiny", "input": {"image": URI}}
    return np.asarray(endpoint.post("/v1/embeddings", body).json()["data"][0]["embedding"], np.float32)


@pytest.fixture(scope="module")
def text(endpoint: Endpoint) -> np.ndarray:
    vector: np.ndarray = send(endpoint, "/v1/embeddings", "a blue star")[0]
    return vector


def request_for(path: str, value: Any, **options: Any) -> dict[str, Any]:
    """Return the body of a request for embeddings of texts or images in the format of `path`."""
    many = value if isinstance(value, list) else [value]
    field = {"/v1/embeddings": "input", "/v1/embed": "texts", "/v2/embed": "texts"}.get(path, "inputs")
    return {"model": "tiny", field: many, **options}


def send(endpoint: Endpoint, path: str, value: Any, **options: Any) -> np.ndarray:
    """Embed texts or images in the format of `path`, and return the embeddings (N, D)."""
    response = endpoint.post(path, request_for(path, value, **options))
    assert response.status_code == 200, response.text
    found = response.json()
    if path == "/v1/embeddings":
        found = [item["embedding"] for item in found["data"]]
    elif "embed" in path and path != "/embed":
        found = found["embeddings"] if path == "/v1/embed" else found["embeddings"]["float"]
    return np.asarray(found, np.float32)


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """Return the error of a refused request."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


PATHS = ["/v1/embeddings", "/embed", "/", "/v1/embed", "/v2/embed"]
NEUTRAL = PATHS[:3]


@pytest.mark.parametrize("path", NEUTRAL)
@pytest.mark.parametrize(
    "value", [URI, f"\n  {URI}", PLAIN, base64.encodebytes(PNG).decode(), URI.upper()[:10] + URI[10:]]
)
def test_what_looks_like_an_image_is_embedded_as_one(
    endpoint: Endpoint, image: np.ndarray, text: np.ndarray, path: str, value: str
) -> None:
    np.testing.assert_allclose(send(endpoint, path, ["a blue star", value]), [text, image], atol=2e-6)
    as_text = send(endpoint, path, value, modality="text")
    assert float(as_text[0] @ image) < 0.9


@pytest.mark.parametrize("path", ["/v1/embed", "/v2/embed"])
@pytest.mark.parametrize("value", [URI, f" {URI}", PLAIN, IMAGE_URL])
def test_an_image_among_coheres_texts_is_refused(endpoint: Endpoint, path: str, value: str) -> None:
    error = refusal(endpoint.post(path, request_for(path, ["a", value])))
    assert (error["code"], error["param"]) == ("unsupported_input", "texts.1")
    assert "send it in images" in error["message"]
    assert len(send(endpoint, path, value, modality="text")) == 1
    inputs = [{"content": [{"type": "text", "text": value}]}]
    assert refusal(endpoint.post(path, {"model": "tiny", "inputs": inputs}))["param"] == "inputs.0"
    assert "modality" in refusal(endpoint.post(path, request_for(path, "a", modality="image")))["message"]


@pytest.mark.parametrize("path", NEUTRAL)
def test_the_url_of_an_image_needs_its_modality(endpoint: Endpoint, path: str) -> None:
    error = refusal(endpoint.post(path, request_for(path, ["a", IMAGE_URL])))
    assert error["code"] == "unsupported_input"
    assert '"modality": "image"' in error["message"]
    assert '"modality": "text"' in error["message"]
    assert ('{"image": URL}' in error["message"]) == (path == "/v1/embeddings")
    assert len(send(endpoint, path, IMAGE_URL, modality="text")) == 1
    assert refusal(endpoint.post(path, request_for(path, IMAGE_URL, modality="image")))["code"] == "fetch_disabled"


def test_texts_and_images_in_the_wrong_field_are_refused(endpoint: Endpoint) -> None:
    def param(path: str, body: dict[str, Any]) -> str:
        return str(refusal(endpoint.post(path, body))["param"])

    def embed(**body: Any) -> str:
        return param("/v1/embeddings", {"model": "tiny", **body})

    assert embed(input=["a", {"text": "a", "image": URI}]) == "input.1"
    assert embed(input={"text": "", "image": URI}) == "input"
    assert embed(input=[{}]) == "input.0"
    assert embed(input=[{"text": URI}]) == "input.0.text"
    assert embed(input=[{"text": "a", "video": "x"}]) == "input.0.video"
    both = {"text": "a", "image_url": {"url": URI}}
    for kind in ("text", "image_url"):
        assert embed(messages=[{"content": [{"type": kind, **both}]}]) == "messages.0.content"
        inputs = [{"content": [{"type": kind, **both}]}]
        assert param("/v2/embed", {"model": "tiny", "inputs": inputs}) == "inputs.0"
    assert param("/", {"inputs": {"image": PLAIN, "question": "what?"}}) == "inputs.question"
    template = {"hypothesis_template": "a photo of {}"}
    assert param("/", {"inputs": URI, "parameters": template}) == "parameters.hypothesis_template"
    assert embed(messages=[{"content": URI}]) == "messages.0.content"
    assert embed(messages=[{"content": [{"type": "text", "text": PLAIN}]}]) == "messages.0.content"
    assert param("/v1/classify", {"image": URI, "labels": ["a", URI[:200]]}) == "labels"
    assert param("/v1/classify", {"image": URI, "labels": ["a", "https://example.com/a.png"]}) == "labels"
    assert param("/v1/classify", {"image": URI, "labels": ["a"], "templates": [PLAIN[:200] + "{label}"]}) == "templates"
    labels = {"candidate_labels": ["a", URI[:200]]}
    assert param("/", {"inputs": URI, "parameters": labels}) == "parameters.candidate_labels"
    assert param("/v1/similarity", {"images": [URI], "texts": ["a", URI]}) == "texts.1"


REFUSED: list[dict[str, Any]] = [
    *({name: 64} for name in ("dimensions", "output_dimension", "dimensionality")),
    *({name: False} for name in ("normalize", "normalized", "use_activation", "add_special_tokens")),
    *({name: True} for name in ("late_chunking", "return_multivector", "softmax", "add_generation_prompt")),
    *({name: "query"} for name in ("prompt_name", "instruction", "chat_template")),
    {"embd_normalize": -1},
    {"long_text_mode": "mean"},
    {"truncate": "middle"},
    {"truncate_prompt_tokens": -2},
    {"embed_dtype": "fp8_e4m3"},
    {"endianness": "middle"},
    {"encoding_format": "bytes"},
    {"embedding_type": ["float", "base64"]},
    {"output_dtype": "int4"},
    {"embedding_types": ["float", "int4"]},
    {"normalize": "perhaps"},
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_cannot_be_done_is_refused_by_name(
    endpoint: Endpoint, path: str, option: dict[str, Any]
) -> None:
    error = refusal(endpoint.post(path, request_for(path, "a", **option)))
    [name] = option
    assert error["param"] in (name, f"{name}.1")
    assert name in error["message"]


@pytest.mark.parametrize("path", PATHS)
def test_null_harmless_and_default_options_change_nothing(endpoint: Endpoint, text: np.ndarray, path: str) -> None:
    nulls = {option.name: None for option in EMBEDDING_OPTIONS}
    np.testing.assert_allclose(send(endpoint, path, "a blue star", **nulls), [text], atol=2e-6)
    harmless = {"user": "me", "priority": 3, "request_id": "x", "unknown": [1], "modality": None}
    defaults = {"dimensions": 128, "normalize": True, "normalized": True, "truncate": True, "truncation_side": "right",
                "task": "retrieval.query", "input_type": "search_query", "late_chunking": False, "prompt_name": None,
                "encoding_format": "float", "embedding_type": "float", "endianness": "native", "max_tokens": 512,
                "truncate_prompt_tokens": -1, "add_special_tokens": True}  # fmt: skip
    np.testing.assert_allclose(send(endpoint, path, "a blue star", **harmless, **defaults), [text], atol=2e-6)


def test_null_is_not_given_on_sightlines_own_routes(endpoint: Endpoint) -> None:
    nulls = dict.fromkeys(("model", "images", "label_set", "templates", "top_k", "threshold", "activation"))
    response = endpoint.post("/v1/classify", {"image": URI, "labels": LABELS, **nulls})
    assert response.json()["data"][0]["labels"][0]["label"] == "blue star"
    assert endpoint.post("/v1/similarity", {"images": [URI], "texts": ["a"], "top_k": None, "model": None}).is_success
    assert refusal(endpoint.post("/v1/classify", {"image": URI, "labels": None}))["param"] == "labels"
    messages = {"model": "tiny", "input": None, "encoding_format": None, "messages": [{"role": None, "content": "a"}]}
    assert endpoint.post("/v1/embeddings", messages).is_success
    parameters = {"candidate_labels": LABELS, "hypothesis_template": None, "top_k": None}
    assert len(endpoint.post("/", {"inputs": URI, "parameters": parameters}).json()) == 3
    assert np.shape(endpoint.post("/", {"inputs": "a", "parameters": None}).json()) == (1, 128)


@pytest.mark.parametrize(
    "option",
    [{"truncate": False}, {"truncate": "NONE"}, {"truncate": "START"}, {"truncation": False}, {"max_tokens": 8},
     {"truncation_direction": "Left"}, {"truncation_side": "left"}, {"truncate_prompt_tokens": 8},
     {"truncate": "false"}],
)  # fmt: skip
@pytest.mark.parametrize("path", PATHS)
def test_a_long_text_is_refused_if_the_request_does_not_allow_its_cut(
    endpoint: Endpoint, path: str, option: dict[str, Any]
) -> None:
    error = refusal(endpoint.post(path, request_for(path, ["a", LONG], **option)))
    [name] = option
    assert error["code"] == "text_too_long"
    assert error["param"].endswith(".1")
    assert name in error["message"]
    assert refusal(endpoint.post(path, request_for(path, LONG * 100, **option)))["code"] == "text_too_long"
    assert len(send(endpoint, path, ["a", "a red circle"], **option)) == 2


@pytest.mark.parametrize("option", [{"truncate": True}, {"truncate": "END"}, {"truncation": True}, {"max_tokens": 16}])
@pytest.mark.parametrize("path", PATHS)
def test_a_long_text_is_cut_if_the_request_allows_it(endpoint: Endpoint, path: str, option: dict[str, Any]) -> None:
    response = endpoint.post(path, request_for(path, ["a", LONG], **option))
    assert (response.status_code, response.headers["x-sightline-truncated"]) == (200, "1")


def test_a_text_of_exactly_the_allowed_tokens_is_not_refused(endpoint: Endpoint) -> None:
    exact = endpoint.post("/v1/embeddings", request_for("/v1/embeddings", "a " * 15, truncate=False))
    assert exact.json()["usage"]["prompt_tokens"] == 16
    one_more = endpoint.post("/v1/embeddings", request_for("/v1/embeddings", "a " * 16, truncate=False))
    assert "truncate: false allows 16" in refusal(one_more)["message"]
    fewer = endpoint.post("/v1/embeddings", request_for("/v1/embeddings", "a " * 8, max_tokens=8))
    assert "9 tokens" in refusal(fewer)["message"]


def test_embeddings_are_encoded_as_asked(endpoint: Endpoint, text: np.ndarray) -> None:
    def embed(**options: Any) -> Any:
        response = endpoint.post("/v1/embeddings", request_for("/v1/embeddings", "a blue star", **options))
        assert response.status_code == 200, response.text
        return response.json()["data"][0]["embedding"]

    def unpack(dtype: str, **options: Any) -> np.ndarray:
        return np.frombuffer(base64.b64decode(embed(**options)), dtype)

    base = {"encoding_format": "base64"}
    np.testing.assert_array_equal(unpack("<f4", **base), unpack("<f4", embedding_type="base64"))
    np.testing.assert_allclose(unpack("<f4", **base), text, atol=2e-6)
    np.testing.assert_allclose(unpack(">f4", **base, endianness="big"), text, atol=2e-6)
    np.testing.assert_allclose(unpack("<f2", **base, embed_dtype="float16"), text, atol=1e-3)
    np.testing.assert_allclose(unpack(">f2", **base, embed_dtype="float16", endianness="big"), text, atol=1e-3)
    assert np.shape(embed(embed_dtype="float16")) == (128,), "embed_dtype is of base64 only"
    levels = np.asarray(embed(output_dtype="int8"))
    assert levels @ text / np.linalg.norm(levels) > 0.999
    np.testing.assert_array_equal(unpack("i1", **base, output_dtype="int8"), levels)
    np.testing.assert_array_equal(np.asarray(embed(output_dtype="uint8")) - 128, levels)
    bits = np.asarray(embed(embedding_type="ubinary"), np.uint8)
    assert (np.unpackbits(bits) == (text > 0)).all()
    np.testing.assert_array_equal(np.asarray(embed(embedding_type="binary")) + 128, bits)


@pytest.mark.parametrize("path", ["/embed", "/", "/v1/embed", "/v2/embed"])
@pytest.mark.parametrize("option", [{"encoding_format": "base64"}, {"output_dtype": "int8"}, {"endianness": "big"}])
def test_paths_with_a_fixed_encoding_refuse_another(endpoint: Endpoint, path: str, option: dict[str, Any]) -> None:
    assert refusal(endpoint.post(path, request_for(path, "a", **option)))["param"] == next(iter(option))


def test_forms_and_queries_have_the_same_options(endpoint: Endpoint, image: np.ndarray) -> None:
    def post(fields: dict[str, str], as_query: bool) -> httpx.Response:
        if as_query:
            headers = {"content-type": "image/png"}
            return endpoint.client.post("/v1/embeddings", params=fields, content=PNG, headers=headers)
        return endpoint.client.post("/v1/embeddings", files={"image": PNG}, data=fields)

    for as_query in (False, True):
        for field, value in {"dimensions": "64", "normalize": "false", "encoding_format": "int4"}.items():
            assert refusal(post({"model": "tiny", field: value}, as_query))["param"] == field
        accepted = post({"dimensions": "128", "normalize": "true", "embedding_type": "base64", "task": ""}, as_query)
        vector = np.frombuffer(base64.b64decode(accepted.json()["data"][0]["embedding"]), "<f4")
        np.testing.assert_allclose(vector, image, atol=2e-6)
    with_text = endpoint.client.post("/v1/embeddings", files={"image": PNG}, data={"input": "a"})
    assert refusal(with_text)["param"] == "input"
    twice = endpoint.client.post(
        "/v1/classify?labels=a&top_k=1&top_k=2", content=PNG, headers={"content-type": "image/png"}
    )
    assert refusal(twice)["param"] == "top_k"


def test_hugging_faces_scores_obey_its_parameters(endpoint: Endpoint) -> None:
    def classify(**parameters: Any) -> httpx.Response:
        return endpoint.post("/", {"inputs": URI, "parameters": {"candidate_labels": LABELS, **parameters}})

    scores = classify().json()
    assert len(scores) == 3
    for exclusive in ({"function_to_apply": "softmax"}, {"multi_label": False}):
        assert sum(one["score"] for one in classify(**exclusive).json()) == pytest.approx(1, abs=1e-5)
    assert classify(multi_label=True).json() == classify(function_to_apply="sigmoid").json() == scores
    assert [one["label"] for one in classify(top_k=1).json()] == ["blue star"]
    assert [one["label"] for one in classify(threshold=0.5).json()] == ["blue star"]
    for wrong in (
        {"function_to_apply": "none"},
        {"top_k": 0},
        {"top_k": True},
        {"tokenizer_kwargs": {"a": 1}},
        {"threshold": 2},
    ):
        assert refusal(classify(**wrong))["param"] == f"parameters.{next(iter(wrong))}"
    nested = endpoint.post("/", {"inputs": "a", "parameters": {"normalize": False}})
    assert refusal(nested)["param"] == "parameters.normalize"
    duplicate = refusal(classify(candidate_labels=["a", "a"]))
    assert (duplicate["param"], "listed twice" in duplicate["message"]) == ("parameters.candidate_labels", True)
    outside = endpoint.post("/", {"inputs": URI, "candidate_labels": LABELS})
    assert refusal(outside)["param"] == "candidate_labels"
    repeated = endpoint.client.post(
        "/?candidate_labels=red circle&candidate_labels=blue star", content=PNG, headers={"content-type": "image/png"}
    )
    assert {one["label"] for one in repeated.json()} == {"red circle", "blue star"}


@pytest.mark.parametrize("body", [{"inputs": {"image": PLAIN}}, {"image": PLAIN}, {"inputs": URI}, {"image": URI}])
def test_every_form_of_an_image_for_hugging_face_is_read(
    endpoint: Endpoint, image: np.ndarray, body: dict[str, Any]
) -> None:
    scores = endpoint.post("/", {**body, "parameters": {"candidate_labels": LABELS}})
    assert scores.json()[0]["label"] == "blue star"
    np.testing.assert_allclose(endpoint.post("/", body).json(), [image], atol=2e-6)
    assert refusal(endpoint.post("/", {**body, "inputs": "a", "image": PLAIN}))["param"] == "inputs"


def test_the_documentation_lists_every_option() -> None:
    page = (Path(__file__).parents[2] / "docs" / "endpoint.md").read_text()
    found = re.search(r"<!-- options -->\n\n(.*?)\n\n<!-- /options -->", page, re.DOTALL)
    assert found is not None
    assert found[1] == describe_options(), "run: python -m serve.options.table"
