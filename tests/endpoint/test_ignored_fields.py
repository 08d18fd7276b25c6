"""Requests that were answered although something in them was ignored: they are refused, and told what to change."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from serve.config import CorsConfig
from tests.support.endpoint import Endpoint, data_uri, make_config, run_endpoint, shape_png
from tests.support.searched_output import write_shapes

PNG = shape_png()
URI = data_uri(PNG)
PDF = base64.b64encode(b"%PDF-1.7" + bytes(range(256)) * 8).decode()
PDF_LINES = [end.join(textwrap.wrap(PDF[:300], 76)) for end in ("\n", "\r\n")]
"""A small file, as the command `base64` and MIME write it."""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    searched = write_shapes(tmp_path_factory.mktemp("searched") / "tags")
    with run_endpoint(make_config(search={"output": searched.uri})) as running:
        yield running


@pytest.mark.parametrize("query", ["top_k=1", "dimensions=5", "encoding_format=base64", "label_set=shapes", "model=x"])
def test_a_field_in_the_query_beside_a_body_with_fields_is_refused(endpoint: Endpoint, query: str) -> None:
    bodies = {
        "/v1/classify": {"image": URI, "labels": ["a"]},
        "/v1/embeddings": {"model": "tiny", "input": "a"},
        "/embed": {"inputs": "a"},
        "/v2/embed": {"model": "tiny", "texts": ["a"]},
        "/v1/similarity": {"texts": ["a"], "images": [URI]},
        "/v1/search": {"text": "a"},
    }
    responses = [endpoint.post(f"{path}?{query}", body) for path, body in bodies.items()]
    responses.append(endpoint.client.post(f"/v1/classify?{query}", data={"labels": "a"}, files={"image": PNG}))
    for response in responses:
        assert response.status_code == 400, response.url
        assert response.json()["error"]["param"] == query.partition("=")[0]
        assert "move it there" in response.json()["error"]["message"]


def test_a_query_that_is_no_field_has_no_effect(endpoint: Endpoint) -> None:
    response = endpoint.post("/v1/embeddings?api-version=2024-02-01", {"model": "tiny", "input": "a"})
    assert response.status_code == 200


def test_a_list_in_one_field_of_a_form_is_refused(endpoint: Endpoint) -> None:
    form = {"labels": '["red circle", "blue star"]'}
    response = endpoint.client.post("/v1/classify", data=form, files={"image": PNG})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "labels")
    response = endpoint.client.post("/v1/classify", params=form, content=PNG, headers={"content-type": "image/png"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "labels")


@pytest.mark.parametrize("labels", ["[a]", ["[1]", "[2]"], ["[a]", "b"], "[" * 256])
def test_a_label_in_brackets_is_a_label(endpoint: Endpoint, labels: str | list[str]) -> None:
    response = endpoint.client.post(
        "/v1/classify", data={"labels": labels, "templates": "a {label}"}, files={"image": PNG}
    )
    if labels == "[" * 256:
        assert "no character of" in response.json()["error"]["message"]
        return
    found = {one["label"] for one in response.json()["data"][0]["labels"]}
    assert found == ({labels} if isinstance(labels, str) else set(labels))


@pytest.mark.parametrize("name", ["label_set", "labels", "hypothesis_template", "templates", "activation"])
def test_hugging_faces_shape_refuses_options_in_a_field_without_effect(endpoint: Endpoint, name: str) -> None:
    parameters = {"candidate_labels": ["red circle", "blue star"]}
    response = endpoint.post("/", {"inputs": URI, "parameters": parameters, name: "softmax"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    if name != "hypothesis_template":
        response = endpoint.post("/", {"inputs": URI, "parameters": {name: "shapes"}})
        assert (response.status_code, response.json()["error"]["param"]) == (400, f"parameters.{name}")


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/cat.jpg", "file:///a/cat.png", "gs://b/cat.webp?x=1", URI.removeprefix("data:"), PDF, *PDF_LINES],
    ids=["s3", "file", "gs", "without data:", "PDF", "PDF in lines", "PDF in CRLF lines"],
)
def test_a_reference_to_an_image_is_not_embedded_as_a_text(endpoint: Endpoint, text: str) -> None:
    for path, body in {
        "/v1/embeddings": {"model": "tiny", "input": text},
        "/embed": {"inputs": text},
        "/v2/embed": {"model": "tiny", "texts": [text]},
    }.items():
        response = endpoint.post(path, body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported_input"), path
    as_text = endpoint.post("/v1/embeddings", {"model": "tiny", "input": text, "modality": "text"})
    assert as_text.status_code == 200


@pytest.mark.parametrize(
    "text",
    ["Data:, a comma after a colon", "data:image/ is how such a URI begins", "/9j/home/user/documents/photos/holidays",
     "R0lGODdhisacodeof40charactersABCDEFGHIJKL", "SUkqAPRODUCTCODE1234567890ABCDEFGH"],
)  # fmt: skip
def test_words_that_begin_like_an_image_are_texts(endpoint: Endpoint, text: str) -> None:
    response = endpoint.post("/v1/embeddings", {"model": "tiny", "input": text})
    assert (response.status_code, response.json()["usage"]["images"]) == (200, 0)


def test_words_are_no_base64(endpoint: Endpoint) -> None:
    response = endpoint.post("/v1/classify", {"image": "hello there", "labels": ["a"]})
    assert response.json()["error"]["code"] == "invalid_image"
    lines = base64.encodebytes(PNG).decode().replace("\n", "\r\n")
    assert endpoint.post("/v1/classify", {"image": lines, "labels": ["a"]}).status_code == 200


@pytest.mark.parametrize("seconds", ["-4", "abc", "0", "nan"])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(endpoint: Endpoint, seconds: str) -> None:
    headers = {"x-request-timeout-seconds": seconds}
    assert endpoint.post("/embed", {"inputs": "a"}, headers=headers).status_code == 400


@pytest.mark.parametrize("origin", ["app.example.com", "https://b.example.com/", "https://b.example.com/path", ""])
def test_what_is_no_origin_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ValueError, match="is not an origin"):
        CorsConfig(origins=["https://app.example.com", origin])


def test_a_preflight_without_configured_origins_says_where_to_list_them(endpoint: Endpoint) -> None:
    headers = {"origin": "https://app.example.com", "access-control-request-method": "POST"}
    response = endpoint.client.options("/v1/embeddings", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")


def test_the_refusal_of_an_image_names_a_key_of_the_endpoint() -> None:
    limits = {"image": {"max_pixels": 100, "max_bytes": 2**20, "max_seconds": 10}}
    with run_endpoint(make_config(limits=limits)) as small:
        response = small.post("/v1/classify", {"image": URI, "labels": ["a"]})
        assert "limits.image.max_pixels" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "tiny", "input": [{"text": "a"}] * 30_000}),
        ("/v1/moderations", {"input": [{"type": "image_url", "image_url": {"url": "x"}}] * 20_000, "labels": ["a"]}),
        ("/v1/classify", {"image": "data:image/png," + "%41" * 1_000_000, "labels": ["a"]}),
        ("/v1/embeddings", {"model": "tiny", "input": int("9" * 200)}),
        ("/v1/embeddings", {"model": "tiny", "input": "data:" + ";a=b" * 1_000_000}),
    ],
    ids=["objects", "parts", "percent-encoding", "digits", "parameters of a data URI"],
)
def test_what_would_take_long_to_read_is_refused_or_read_in_part(
    endpoint: Endpoint, path: str, body: dict[str, object]
) -> None:
    response = endpoint.post(path, body)
    assert response.status_code in (200, 400), response.text[:300]
    assert response.status_code == 400 or response.headers["x-sightline-truncated"] == "1"


@pytest.mark.parametrize("name", ["label_set", "labels", "templates", "activation"])
def test_hugging_faces_shape_refuses_such_options_in_the_query_of_an_image_too(endpoint: Endpoint, name: str) -> None:
    query = {"candidate_labels": "red circle,blue star", name: "x"}
    response = endpoint.client.post("/", params=query, content=PNG, headers={"content-type": "image/png"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, f"parameters.{name}")


@pytest.mark.parametrize("spaces", [1, 2000, 8100])
def test_an_image_behind_white_space_is_an_image(endpoint: Endpoint, spaces: int) -> None:
    for source in (URI, URI.partition(",")[2]):
        response = endpoint.post("/v1/embeddings", {"model": "tiny", "input": " " * spaces + source})
        assert (response.status_code, response.json()["usage"]["images"]) == (200, 1)
    refused = endpoint.post("/v1/embeddings", {"model": "tiny", "input": "\n" * spaces + PDF})
    assert refused.json()["error"]["code"] == "unsupported_input"


def test_moderations_refuse_more_labels_than_one_result_can_have(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.routes.moderations.LABELS", 2)
    for count, status in ((2, 200), (3, 400)):
        response = endpoint.post("/v1/moderations", {"input": URI, "labels": ["red circle", "blue star", "x"][:count]})
        assert response.status_code == status
    assert response.json()["error"]["code"] == "too_many_pairs"


EMBED_BODIES: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"model": "tiny", "input": "a"},
    "/embed": {"inputs": "a"},
    "/": {"inputs": "a"},
    "/v1/embed": {"texts": ["a"]},
    "/v2/embed": {"model": "tiny", "texts": ["a"]},
}


@pytest.mark.parametrize("path", EMBED_BODIES)
@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"precision": "int8"}, "precision", "send float32"),
        ({"pooling": "mean"}, "pooling", "one way of pooling"),
        ({"pooling_type": "CLS"}, "pooling_type", "one way of pooling"),
        ({"title": "A book"}, "title", "has no prompts"),
        ({"outputDimensionality": 64}, "outputDimensionality", "cannot be shortened"),
        ({"output_dimensionality": 64}, "output_dimensionality", "cannot be shortened"),
        ({"Output-Dimension": 128}, "Output-Dimension", "write output_dimension"),
        ({"encodingFormat": "base64"}, "encodingFormat", "write encoding_format"),
        ({"embeddingTypes": ["int8"]}, "embeddingTypes", "write embedding_types"),
        ({"taskType": "RETRIEVAL_QUERY"}, "taskType", "write task_type"),
        ({"embeddingConfig": {"outputEmbeddingLength": 256}}, "embeddingConfig.outputEmbeddingLength", "leave it out"),
        ({"config": {"dimensions": 64}}, "config.dimensions", "write dimensions beside config"),
        ({"extra_body": {"normalise": False}}, "extra_body.normalise", "leave it out"),
        ({"truncation_strategy": "start"}, "truncation_strategy", "leave it out"),
        ({"return_sparse": True}, "return_sparse", "leave it out"),
        ({"parameters": {"normalize": False}}, "parameters.normalize", "unit norm"),
        ({"parameters": {"outputDimensionality": 64}}, "parameters.outputDimensionality", "cannot be shortened"),
        ({"parameters": {"output-dtype": "int8"}}, "parameters.output-dtype", "write output_dtype"),
        ({"truncate": True, "parameters": {"truncate": False}}, "parameters.truncate", "send one"),
        ({"parameters": {"top_k": 1}}, "parameters.top_k", "embeddings, not scores"),
        ({"threshold": 0.5}, "threshold", "embeddings, not scores"),
        ({"embedding_type": "float", "output_dtype": "int8"}, "output_dtype", "embedding_type asks for float"),
        ({"encoding_format": "float", "embedding_type": "base64"}, "embedding_type", "encoding_format asks for float"),
        ({f"field{n}": 1 for n in range(65)}, "field0", "65 fields"),
    ],
)
def test_an_option_in_no_table_is_refused(
    endpoint: Endpoint, path: str, options: dict[str, Any], param: str, message: str
) -> None:
    response = endpoint.post(path, {**EMBED_BODIES[path], **options})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("path", EMBED_BODIES)
def test_options_of_other_vendors_are_done_or_change_nothing(endpoint: Endpoint, path: str) -> None:
    body = EMBED_BODIES[path]
    plain = endpoint.post(path, body)
    harmless: dict[str, Any] = {
        **{"user": "me", "metadata": {"prompt": "x"}, "options": {"wait_for_model": True}, "keep_alive": "5m"},
        **{"autoTruncate": True, "precision": "float32", "output_dimensionality": 128, "max_length": 64},
        **{"truncate": True, "pooling": None, "taskType": None, "parameters": {"truncate": True, "user": "me"}},
    }
    if path == "/":
        harmless["parameters"] = {"truncate": True}
    response = endpoint.post(path, {**body, **harmless})
    assert response.status_code == 200, response.text
    for name in ("data", "embeddings"):
        if isinstance(plain.json(), dict) and name in plain.json():
            assert response.json()[name] == plain.json()[name]
    text = "a photo of a red circle " * 40
    field = next(name for name in ("input", "inputs", "texts") if name in body)
    long = {**body, field: [text]}
    assert endpoint.post(path, long).status_code == 200
    for option in ({"autoTruncate": False}, {"max_length": 8}, {"truncate_input_tokens": 8}):
        response = endpoint.post(path, {**long, **option})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "text_too_long")
    response = endpoint.post("/v1/embeddings", {**EMBED_BODIES["/v1/embeddings"], "output_encoding": "base64"})
    assert isinstance(response.json()["data"][0]["embedding"], str)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"parameters": {"multiLabel": True}}, "parameters.multiLabel", "write multi_label"),
        ({"parameters": {"candidateLabels": ["a"]}}, "parameters.candidateLabels", "write candidate_labels"),
        ({"parameters": {"score_threshold": 0.1}}, "parameters.score_threshold", "leave it out"),
        ({"parameters": {"normalize": False}}, "parameters.normalize", "scores, not embeddings"),
        ({"truncate": False}, "truncate", "scores, not embeddings"),
        ({"topK": 1}, "topK", "write top_k"),
        ({"top_k": 1, "parameters": {"top_k": 2}}, "parameters.top_k", "send one"),
        ({"function_to_apply": "softmax", "multi_label": True}, "multi_label", "function_to_apply asks for softmax"),
        ({"options": {"top_k": 1}}, "options.top_k", "write top_k beside options"),
    ],
)
def test_an_option_of_a_classification_in_no_table_is_refused(
    endpoint: Endpoint, fields: dict[str, Any], param: str, message: str
) -> None:
    parameters = {"candidate_labels": ["red circle", "blue star"], **fields.get("parameters", {})}
    response = endpoint.post("/", {"inputs": URI, **fields, "parameters": parameters})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert message in response.json()["error"]["message"]
    if "parameters" in fields and "top_k" not in fields:  # the same in the query beside an image
        name = param.removeprefix("parameters.")
        response = endpoint.client.post(
            f"/?candidate_labels=a&{name}=false", content=PNG, headers={"content-type": "image/png"}
        )
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)


def test_another_model_is_refused_on_the_paths_of_hugging_face(endpoint: Endpoint) -> None:
    for path in ("/", "/embed"):
        assert endpoint.post(path, {"inputs": "a", "model": "tiny"}).status_code == 200
        response = endpoint.post(path, {"inputs": "a", "model": "other"})
        assert (response.status_code, response.json()["error"]["param"]) == (404, "model")
    response = endpoint.client.post("/?model=other", content=PNG, headers={"content-type": "image/png"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
