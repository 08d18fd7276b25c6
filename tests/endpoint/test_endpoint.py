"""The endpoint's request and response schemas, limits and errors, with the real application and model over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from serve.admission.auth import new_key
from serve.http.errors import CODES
from serve.label_sets.files import REREAD_SECONDS
from serve.rayserve.haproxy import PEER
from sightline.demo.shapes import LABELS
from siglip.checkpoint import pin_model
from siglip.heads import accept_thresholds, build_head, name_bands, tag_embeddings
from siglip.images.decode import REASONS
from siglip.label_text.fitted import Probe
from siglip.labels import LabelSet
from tests.support.agreement import check_agreement
from tests.support.endpoint import Endpoint, data_uri, make_config, run_endpoint, shape_png
from tests.support.images import awkward_cases, encode, make_rgb
from tests.support.searched_output import write_shapes


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    searched = write_shapes(tmp_path_factory.mktemp("searched") / "tags")
    limits = {
        "body_bytes": 400_000,
        "images": 4,
        "image": {"max_bytes": 200_000, "max_pixels": 250_000, "max_seconds": 5},
        "texts": 5,
        "labels": 80,
        "label_characters": 30,
    }
    with run_endpoint(make_config(limits=limits, search={"output": searched.uri})) as running:
        yield running


def labels_of(response: httpx.Response) -> list[list[str]]:
    """Return the labels of each image, best first, in a successful response of /v1/classify."""
    assert response.status_code == 200, response.text
    return [[label["label"] for label in item["labels"]] for item in response.json()["data"]]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error in an error response. Fails if the response is not OpenAI's error envelope."""
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = body["error"]
    return error


def test_classify_takes_labels_or_a_registered_label_set(endpoint: Endpoint) -> None:
    image = data_uri(shape_png("red circle"))
    by_labels = endpoint.post("/v1/classify", {"image": image, "labels": ["blue star", "red circle", "green ring"]})
    assert (
        labels_of(by_labels) == [["red circle", "blue star", "green ring"]]
        or labels_of(by_labels)[0][0] == "red circle"
    )
    scores = [label["score"] for label in by_labels.json()["data"][0]["labels"]]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.5 > scores[1]
    registered = endpoint.post(
        "/v1/classify", {"images": [image, data_uri(shape_png("blue star"))], "label_set": "shapes"}
    )
    assert [row[0] for row in labels_of(registered)] == ["red circle", "blue star"]
    assert all(len(row) <= 3 for row in labels_of(registered)), "the label set's top_k is 3"
    for response in (by_labels, registered):
        fingerprint = response.json()["fingerprint"]
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", fingerprint["model"])
        assert re.fullmatch(r"[0-9a-f]{16}", fingerprint["labels"])
        assert response.headers["x-sightline-model"] == fingerprint["model"]
        assert response.headers["x-sightline-labels"] == fingerprint["labels"]
        timing = response.headers["server-timing"]
        assert all(f"{stage};dur=" in timing for stage in ("queue", "decode", "batch", "forward", "total"))
    assert endpoint.client.get("/v1/label-sets").json()["data"][0]["labels"] == list(LABELS)


def test_top_k_threshold_templates_and_activation_change_the_response(endpoint: Endpoint) -> None:
    query = {"image": data_uri(shape_png("green heart")), "labels": ["green heart", "red ring", "blue cross"]}
    assert labels_of(endpoint.post("/v1/classify", {**query, "top_k": 1})) == [["green heart"]]
    assert labels_of(endpoint.post("/v1/classify", {**query, "threshold": 0.5})) == [["green heart"]]
    assert labels_of(endpoint.post("/v1/classify", {**query, "threshold": 1})) == [[]]
    softmax = endpoint.post("/v1/classify", {**query, "activation": "softmax"}).json()["data"][0]["labels"]
    assert sum(label["score"] for label in softmax) == pytest.approx(1, abs=1e-5)
    templates = {"templates": ["a photo of a {label}", "{label}"]}
    templated = endpoint.post("/v1/classify", {**query, **templates})
    plain = endpoint.post("/v1/classify", query)
    assert templated.json()["fingerprint"]["labels"] != plain.json()["fingerprint"]["labels"]
    scores = {row["label"]: row["score"] for row in templated.json()["data"][0]["labels"]}
    assert scores != {row["label"]: row["score"] for row in plain.json()["data"][0]["labels"]}


def test_every_encoding_of_an_image_gives_the_same_scores(endpoint: Endpoint) -> None:
    png = shape_png("yellow square")
    text = base64.b64encode(png).decode()
    lines = "\n".join(text[n : n + 76] for n in range(0, len(text), 76))
    urlsafe = base64.urlsafe_b64encode(png).decode().rstrip("=")
    escaped = "data:image/png," + "".join(f"%{byte:02x}" for byte in png)
    expected = endpoint.post("/v1/classify", {"image": data_uri(png), "label_set": "shapes"}).json()["data"]
    assert expected[0]["labels"][0]["label"] == "yellow square"
    for image in (text, lines, urlsafe, escaped):
        assert endpoint.post("/v1/classify", {"image": image, "label_set": "shapes"}).json()["data"] == expected
    form = endpoint.client.post("/v1/classify", files={"image": png}, data={"label_set": "shapes"})
    assert form.json()["data"] == expected
    files = [("image", ("a.png", png)), ("image", ("b.png", shape_png("red ring")))]
    fields = {"labels": ["yellow square", "red ring"], "templates": "a photo of a {label}", "top_k": "1"}
    assert labels_of(endpoint.client.post("/v1/classify", files=files, data=fields)) == [
        ["yellow square"],
        ["red ring"],
    ]


def test_similarity_ranks_images_for_each_text_and_texts_for_each_image(endpoint: Endpoint) -> None:
    names = ["red circle", "blue star", "green ring"]
    texts = [f"a photo of a {name}" for name in names]
    images = [data_uri(shape_png(name)) for name in reversed(names)]
    response = endpoint.post("/v1/similarity", {"texts": texts, "images": images}).json()
    assert [row["matches"][0]["index"] for row in response["texts"]] == [2, 1, 0]
    assert [row["matches"][0]["index"] for row in response["images"]] == [2, 1, 0]
    assert all(len(row["matches"]) == 3 for row in response["texts"] + response["images"])
    cosines = {(row["index"], match["index"]): match["cosine"] for row in response["texts"] for match in row["matches"]}
    assert all(
        match["cosine"] == cosines[match["index"], row["index"]]
        for row in response["images"]
        for match in row["matches"]
    )
    top_one = endpoint.post("/v1/similarity", {"texts": texts, "images": images, "top_k": 1}).json()
    assert [len(row["matches"]) for row in top_one["texts"]] == [1, 1, 1]
    vectors = endpoint.post("/v1/embeddings", {"model": "tiny", "input": [texts[0], images[2]]}).json()["data"]
    dot = float(np.dot(vectors[0]["embedding"], vectors[1]["embedding"]))
    assert dot == pytest.approx(response["texts"][0]["matches"][0]["cosine"], abs=1e-5)


def test_embeddings_accept_every_kind_of_input(endpoint: Endpoint) -> None:
    png = shape_png("black cross")
    uri, plain = data_uri(png), base64.b64encode(png).decode()

    def embed(**body: Any) -> list[list[float]]:
        response = endpoint.post("/v1/embeddings", {"model": "tiny", **body})
        assert response.status_code == 200, response.text
        return [item["embedding"] for item in response.json()["data"]]

    [image] = embed(input=uri)
    [text] = embed(input="a black cross")
    assert np.linalg.norm(image) == pytest.approx(1, abs=1e-5)
    mixed = embed(input=["a black cross", uri, {"image": plain}, {"text": "a black cross"}])
    np.testing.assert_allclose(mixed, [text, image, image, text], atol=2e-6)
    np.testing.assert_allclose(embed(input=plain, modality="image"), [image], atol=2e-6)
    np.testing.assert_allclose(embed(input={"image": uri}), [image], atol=2e-6)
    # A list of messages gives one embedding: its image's, or that of all its texts joined.
    user = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": ""}]}
    np.testing.assert_allclose(embed(messages=[user]), [image], atol=2e-6)
    both = {"model": "tiny", "messages": [{"role": "system", "content": "Represent the image."}, user]}
    assert error_of(endpoint.post("/v1/embeddings", both))["code"] == "unsupported_input"
    words = [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "black cross"}]}]
    np.testing.assert_allclose(embed(messages=words), [text], atol=2e-6)
    # With `modality: text` a URL is a text. As an image it is refused here, because fetching is off by default.
    assert len(embed(input="https://example.com/cat.jpg", modality="text")) == 1
    refused = endpoint.post(
        "/v1/embeddings", {"model": "tiny", "input": "https://example.com/a.jpg", "modality": "image"}
    )
    assert error_of(refused)["code"] == "fetch_disabled"
    as_bytes = endpoint.post("/v1/embeddings", {"model": "tiny", "input": uri, "encoding_format": "base64"})
    vector = np.frombuffer(base64.b64decode(as_bytes.json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, image, atol=2e-6)
    usage = endpoint.post("/v1/embeddings", {"model": "tiny", "input": ["a", "b", uri]}).json()["usage"]
    assert usage == {"prompt_tokens": 4, "total_tokens": 4, "images": 1, "truncated_texts": 0}


PNG = base64.b64encode(shape_png()).decode()
VALID = {"image": PNG, "labels": ["a", "b"]}
BAD_REQUESTS: list[tuple[str, str, Any, int, str, str | None]] = [
    ("no labels", "/v1/classify", {"image": PNG}, 400, "invalid_request", "labels"),
    ("labels and a label set", "/v1/classify", {**VALID, "label_set": "shapes"}, 400, "invalid_request", "labels"),
    ("no image", "/v1/classify", {"labels": ["a"]}, 400, "invalid_request", "image"),
    ("image and images", "/v1/classify", {**VALID, "images": [PNG]}, 400, "invalid_request", "image"),
    ("empty labels", "/v1/classify", {"image": PNG, "labels": []}, 400, "invalid_request", "labels"),
    ("no images", "/v1/classify", {"images": [], "labels": ["a"]}, 400, "invalid_request", "images"),
    ("duplicate label", "/v1/classify", {"image": PNG, "labels": ["a", "a"]}, 400, "invalid_request", "labels"),
    ("label without letters", "/v1/classify", {"image": PNG, "labels": ["?!"]}, 400, "invalid_request", "labels"),
    ("template without a label", "/v1/classify", {**VALID, "templates": ["x"]}, 400, "invalid_request", "templates"),
    ("templates for a label set", "/v1/classify", {"image": PNG, "label_set": "shapes", "templates": ["{}"]}, 400,
     "invalid_request", "templates"),
    ("unknown label set", "/v1/classify", {"image": PNG, "label_set": "cats"}, 404, "label_set_not_found", "label_set"),
    ("unknown model, classify", "/v1/classify", {**VALID, "model": "gpt"}, 404, "model_not_found", "model"),
    ("top_k 0", "/v1/classify", {**VALID, "top_k": 0}, 400, "invalid_request", "top_k"),
    ("threshold 2", "/v1/classify", {**VALID, "threshold": 2}, 400, "invalid_request", "threshold"),
    ("unknown field", "/v1/classify", {**VALID, "treshold": 0.2}, 400, "invalid_request", "treshold"),
    ("softmax misspelt", "/v1/classify", {**VALID, "activation": "soft"}, 400, "invalid_request", "activation"),
    ("not base64", "/v1/classify", {**VALID, "image": "a cat."}, 400, "invalid_image", "image"),
    ("incomplete data URI", "/v1/classify", {**VALID, "image": "data:image/png;base64"}, 400, "invalid_image", "image"),
    ("not an image", "/v1/classify", {**VALID, "image": "aGVsbG8="}, 400, "not_an_image", "image"),
    ("empty image", "/v1/classify", {**VALID, "image": ""}, 400, "empty", "image"),
    ("second image bad", "/v1/classify", {"images": [PNG, "aGVsbG8="], "labels": ["a"]}, 400, "not_an_image",
     "images.1"),
    ("too many images", "/v1/classify", {"images": [PNG] * 5, "labels": ["a"]}, 400, "too_many_images", None),
    ("too many labels", "/v1/classify", {"image": PNG, "labels": [f"l{n}" for n in range(81)]}, 400,
     "too_many_labels", "labels"),
    ("too many prompts", "/v1/classify", {"image": PNG, "labels": [f"l{n}" for n in range(41)],
     "templates": ["{}", "a {}"]}, 400, "too_many_labels", "labels"),
    ("long label", "/v1/classify", {"image": PNG, "labels": ["a" * 31]}, 400, "label_too_long", "labels"),
    ("long template", "/v1/classify", {**VALID, "templates": ["{} " + "a" * 30]}, 400, "label_too_long", "templates"),
    ("too many pixels", "/v1/classify", {**VALID, "image": data_uri(encode(Image.new("1", (600, 600))))}, 400,
     "too_many_pixels", "image"),
    ("too many texts", "/v1/embeddings", {"model": "tiny", "input": ["a"] * 6}, 400, "too_many_texts", None),
    ("no input", "/v1/embeddings", {"model": "tiny"}, 400, "invalid_request", "input"),
    ("empty input", "/v1/embeddings", {"model": "tiny", "input": []}, 400, "invalid_request", "input"),
    ("empty text", "/v1/embeddings", {"model": "tiny", "input": ""}, 400, "invalid_request", "input"),
    ("no model", "/v1/embeddings", {"input": "a"}, 400, "invalid_request", "model"),
    ("unknown model, embeddings", "/v1/embeddings", {"model": "clip", "input": "a"}, 404, "model_not_found", "model"),
    ("token ids", "/v1/embeddings", {"model": "tiny", "input": [1, 2]}, 400, "unsupported_input", "input"),
    ("lists of token ids", "/v1/embeddings", {"model": "tiny", "input": [[1, 2]]}, 400, "unsupported_input", "input.0"),
    ("dimensions, embeddings", "/v1/embeddings", {"model": "tiny", "input": "a", "dimensions": 64}, 400,
     "unsupported_dimensions", "dimensions"),
    ("two images in the messages", "/v1/embeddings", {"model": "tiny", "messages": [{"content": [
        {"type": "image_url", "image_url": {"url": PNG}}, {"type": "image_url", "image_url": {"url": PNG}}]}]}, 400,
     "unsupported_input", "messages"),
    ("messages without content", "/v1/embeddings", {"model": "tiny", "messages": [{"content": ""}]}, 400,
     "invalid_request", "messages"),
    ("lone surrogate", "/v1/embeddings", '{"model": "tiny", "input": "\\ud800"}', 400, "invalid_request", "input"),
    ("not JSON, embeddings", "/v1/embeddings", "{", 400, "invalid_json", None),
    ("not JSON, classify", "/v1/classify", "{", 400, "invalid_json", None),
    ("a list instead of an object", "/v1/classify", [], 400, "invalid_request", None),
    ("no texts", "/v1/similarity", {"texts": [], "images": [PNG]}, 400, "invalid_request", "texts"),
    ("dimensions, Hugging Face", "/", {"inputs": "a", "dimensions": 5}, 400, "unsupported_dimensions", "dimensions"),
    ("not normalised, Hugging Face", "/", {"inputs": "a", "normalize": False}, 400, "invalid_request", "normalize"),
    ("no input, Cohere", "/v2/embed", {"model": "tiny"}, 400, "invalid_request", "texts"),
    ("no such path", "/v1/chat/completions", {}, 404, "not_found", None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "code", "param"), [case[1:] for case in BAD_REQUESTS],
                         ids=[case[0] for case in BAD_REQUESTS])  # fmt: skip
def test_a_bad_request_is_refused_with_its_code_and_field(
    endpoint: Endpoint, path: str, body: Any, status: int, code: str, param: str | None
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    response = endpoint.client.post(path, content=content, headers={"content-type": "application/json"})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), response.text
    assert code in CODES or code in REASONS


def test_requests_of_a_wrong_type_or_size_are_refused(endpoint: Endpoint) -> None:
    client = endpoint.client
    assert error_of(client.get("/v1/embeddings"))["code"] == "method_not_allowed"
    text_plain = client.post("/v1/classify", content=b"x", headers={"content-type": "text/plain"})
    assert (text_plain.status_code, error_of(text_plain)["code"]) == (415, "unsupported_media_type")
    untyped = client.post("/v1/embeddings", content=b'{"model": "tiny", "input": "a"}')
    assert (untyped.status_code, error_of(untyped)["code"]) == (415, "unsupported_media_type")
    large_image = endpoint.post("/v1/classify", {"image": base64.b64encode(bytes(210_000)).decode(), "labels": ["a"]})
    assert (large_image.status_code, error_of(large_image)["code"]) == (413, "too_many_bytes")
    body = json.dumps({"image": "A" * 500_000, "labels": ["a"]}).encode()
    declared = client.post("/v1/classify", content=body, headers={"content-type": "application/json"})
    streamed = client.post("/v1/classify", content=iter([body[:1000], body[1000:]]))
    for response in (declared, streamed):
        assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
    field_as_file = client.post("/v1/classify", files={"labels": b"x", "image": shape_png()})
    assert error_of(field_as_file)["param"] == "labels"
    other_file = client.post("/v1/classify", files={"other": b"x"}, data={"labels": "a"})
    assert (other_file.status_code, error_of(other_file)["param"]) == (400, "other")
    image_as_text = client.post("/v1/classify", files={"image": (None, "text")}, data={"labels": "a"})
    assert (image_as_text.status_code, error_of(image_as_text)["param"]) == (400, "image")
    broken = client.post(
        "/v1/classify", content=b"--x\r\n", headers={"content-type": "multipart/form-data; boundary=y"}
    )
    assert broken.status_code == 400
    assert error_of(broken)["code"] == "invalid_request"


def test_batch_job_and_endpoint_give_the_same_numbers(endpoint: Endpoint, local_ray: None, tmp_path: Path) -> None:
    """The same images, among them unusual ones, through the batch job and over HTTP: embeddings, labels, scores."""
    images = {name: data for name, data, _ in awkward_cases()}
    images |= {label: shape_png(label, seed) for seed, label in enumerate(LABELS[::5])}
    check_agreement(endpoint, {"source": "tiny", "dtype": "float32"}, list(images.values()), tmp_path)


def test_bands_groups_calibrations_and_probes_give_the_batch_jobs_results(endpoint: Endpoint, tmp_path: Path) -> None:
    """The label set in the file uses every feature. The expected results are what the job writes for the same
    embedding."""
    encoder, pinned = endpoint.model.actor.encoder, pin_model(endpoint.service.config.model)
    direction = encoder.embed_texts(["a photo of a green star"])[0]
    full: dict[str, Any] = {
        "names": [
            {"name": "red circle", "accept": 0.6},
            {"name": "blue square", "calibration": {"scale": 0.5, "bias": 1.5}, "accept": 0.99},
            {"name": "starry", "probe": Probe.of(direction * 90, -30.0, pinned.identity).model_dump(), "accept": 0.5},
            "red heart",
            "red ring",
        ],
        "templates": ["a photo of a {label}"],
        "groups": {"red": ["red heart", "red ring"]},
        "threshold": 0.01,
        "top_k": 4,
    }
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(full))
    labels = LabelSet.model_validate(full)
    head = build_head(labels, encoder.embed_labels(labels), encoder.scale, pinned.identity)
    seen = set()
    with run_endpoint(make_config(label_sets={"full": str(tmp_path / "full.yaml")}), endpoint.model) as second:
        for seed, label in enumerate(("red circle", "blue square", "green star", "red heart", "red ring")):
            uri = data_uri(shape_png(label, seed))
            [response] = second.post("/v1/classify", {"image": uri, "label_set": "full"}).json()["data"]
            [embedding] = second.post("/v1/embeddings", {"model": "tiny", "input": uri}).json()["data"]
            chosen = tag_embeddings(np.asarray([embedding["embedding"]], np.float32), labels, head)
            bands = name_bands(chosen.labels, chosen.scores, accept_thresholds(labels)).tolist()
            assert [(one["label"], one["band"]) for one in response["labels"]] == [
                (labels.names[i].name, band) for i, band in zip(chosen.labels, bands, strict=True)
            ]
            np.testing.assert_allclose([one["score"] for one in response["labels"]], chosen.scores, rtol=1e-5)
            seen |= {(one["label"], one["band"]) for one in response["labels"]}
        # A lower threshold of the request brings labels under the label set's own, which are in no band.
        query = {"image": uri, "label_set": "full", "threshold": 0.0, "top_k": 99}
        every = second.post("/v1/classify", query).json()["data"][0]["labels"]
        assert [one["label"] for one in every if "band" in one] == [one["label"] for one in response["labels"]]
        assert any("band" not in one for one in every)
        softmax = second.post("/v1/classify", {"image": uri, "label_set": "full", "activation": "softmax"}).json()
        assert all("band" not in one for one in softmax["data"][0]["labels"])
        plain = endpoint.post("/v1/classify", {"image": uri, "label_set": "shapes"}).json()
        assert all("band" not in one for one in plain["data"][0]["labels"])
        # A file whose probe belongs to another model is invalid, so the endpoint keeps the previous label set.
        full["names"][2]["probe"]["model"] = "another"
        (tmp_path / "full.yaml").write_text(yaml.safe_dump(full))
        time.sleep(2 * REREAD_SECONDS)
        after = second.post("/v1/classify", {"image": uri, "label_set": "full"}).json()
        assert after["data"] == [response]
    assert {("red circle", "accept"), ("starry", "accept")} <= seen
    assert "review" in {band for _, band in seen}


def test_the_prompts_of_a_label_set_are_embedded_once(endpoint: Endpoint) -> None:
    texts = 0
    embed = endpoint.model.actor.encoder.embed_and_read

    def count(prompts: list[str]) -> Any:
        nonlocal texts
        texts += len(prompts)
        return embed(prompts)

    endpoint.model.actor.encoder.embed_and_read = count  # type: ignore[method-assign, assignment]
    try:
        body = {"image": PNG, "labels": [f"number {n}" for n in range(80)]}
        responses = [endpoint.post("/v1/classify", body).json() for _ in range(3)]
        assert texts == 80
        tokens = [response["usage"]["prompt_tokens"] for response in responses]
        assert tokens[0] >= 80 * 8
        assert tokens[1:] == [0, 0], "cached prompts cost no tokens"
        assert responses[0]["data"] == responses[2]["data"]
        endpoint.post("/v1/classify", {"image": PNG, "label_set": "shapes"})
        assert texts == 80
        # Ten concurrent requests with the same new labels embed them once.
        body["labels"] = [f"other {n}" for n in range(30)]
        threads = [threading.Thread(target=endpoint.post, args=("/v1/classify", body)) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert texts == 110
    finally:
        endpoint.model.actor.encoder.embed_and_read = embed  # type: ignore[method-assign]


def test_the_cache_of_prompts_has_a_limited_size() -> None:
    with run_endpoint(make_config(limits={"label_cache_bytes": 15_000})) as running:
        tokens = []
        for labels in ("abc", "abc", "def", "abc", "abc"):  # five prompts fit: "def" evicts one prompt of "abc"
            response = running.post("/v1/classify", {"image": PNG, "labels": list(labels)})
            tokens.append(response.json()["usage"]["prompt_tokens"])
        assert tokens == [21, 0, 21, 7, 0], "two of the three prompts of abc were still cached"


@pytest.mark.alone
def test_a_stuck_model_fails_readiness_and_the_health_check_until_it_responds(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert endpoint.client.get("/healthz").json() == {"status": "ok"}
    assert endpoint.client.get("/readyz").json() == {"status": "ready"}
    monkeypatch.setattr("serve.rayserve.replica.STUCK_SECONDS", 0.3)
    monkeypatch.setattr("serve.routes.pages.READY_SECONDS", 0.0)
    release = threading.Event()
    forward = endpoint.model.actor.encoder._forward
    endpoint.model.actor.encoder._forward = lambda pixels: (release.wait(120), forward(pixels))[1]
    try:
        stuck = threading.Thread(target=endpoint.post, args=("/v1/classify", {"image": PNG, "label_set": "shapes"}))
        stuck.start()
        time.sleep(0.6)
        response = endpoint.client.get("/readyz")
        assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
        assert endpoint.client.get("/healthz").status_code == 200
        with pytest.raises(Exception, match="has not answered for"):
            asyncio.run(endpoint.model.check_health())
    finally:
        release.set()
        stuck.join()
        endpoint.model.actor.encoder._forward = forward
    time.sleep(0.3)
    asyncio.run(endpoint.model.check_health())
    assert endpoint.client.get("/readyz").status_code == 200


def test_a_failing_model_gives_503_and_no_internal_error(endpoint: Endpoint) -> None:
    forward = endpoint.model.actor.encoder._forward
    endpoint.model.actor.encoder._forward = lambda pixels: forward(pixels) * float("nan")
    try:
        response = endpoint.post("/v1/classify", {"image": PNG, "label_set": "shapes"})
        assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
        assert int(response.headers["retry-after"]) >= 1
    finally:
        endpoint.model.actor.encoder._forward = forward


def test_an_item_past_its_deadline_is_dropped_before_the_model(endpoint: Endpoint) -> None:
    release = threading.Event()
    encoder = endpoint.model.actor.encoder
    forward, batches = encoder._forward, []

    def slow(pixels: Any) -> Any:
        batches.append(len(pixels))
        release.wait(120)
        return forward(pixels)

    encoder._forward = slow
    body = {"image": PNG, "label_set": "shapes"}
    try:
        first = threading.Thread(target=endpoint.post, args=("/v1/classify", body))
        first.start()
        while not batches:
            time.sleep(0.01)
        expired = endpoint.post("/v1/classify", body, headers={"x-request-timeout-seconds": "0.5"})
        assert (expired.status_code, error_of(expired)["code"]) == (429, "deadline_exceeded")
        assert int(expired.headers["retry-after"]) >= 1
    finally:
        release.set()
        first.join()
        encoder._forward = forward
    assert endpoint.post("/v1/classify", body).status_code == 200
    assert batches == [1], "the model must not compute the image whose deadline has passed"


def test_keys_and_rates_are_enforced_and_no_secret_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, line = new_key("alice")
    (tmp_path / "keys").write_text(line + "\n")
    auth = {"keys_file": str(tmp_path / "keys"), "requests_per_minute": 3}
    body = {"image": PNG, "label_set": "shapes"}
    with run_endpoint(make_config(auth=auth)) as running, caplog.at_level("INFO", "ray.serve.sightline"):
        caplog.handler.setFormatter(None)
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {key}"}):
            refused = running.post("/v1/classify", body, headers=headers)
            assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
        assert running.client.get("/v1/models").status_code == 401
        for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz"):
            assert running.client.get(path).status_code == 200
        good = {"authorization": f"Bearer {key}", "x-request-id": "my-request-1"}
        left = [running.post("/v1/classify", body, headers=good).headers for _ in range(3)]
        assert [headers["x-ratelimit-remaining-requests"] for headers in left] == ["2", "1", "0"]
        over = running.post("/v1/classify", body, headers={"authorization": f"bearer {key}"})
        assert (over.status_code, error_of(over)["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(over.headers["retry-after"]) <= 20
    records = [record for record in caplog.records if record.name == "ray.serve.sightline"]
    logged = [record.__dict__ for record in records if record.__dict__.get("request_id") == "my-request-1"]
    assert len(logged) == 3
    assert logged[0]["key"] == "alice"
    assert logged[0]["images"] == 1
    assert logged[0]["stages_ms"].keys() >= {"queue", "decode", "batch", "forward"}
    text = " ".join(str(record.__dict__) for record in records)
    assert key not in text
    assert "wrong" not in text
    assert PNG[:40] not in text


@pytest.mark.parametrize("headers", [{"host": "evil.example"}, {"x-forwarded-for": "203.0.113.9"}])
def test_without_keys_only_loopback_clients_are_served(endpoint: Endpoint, headers: dict[str, str]) -> None:
    response = endpoint.client.get("/v1/models", headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (403, "loopback_only")
    assert endpoint.client.get("/healthz", headers=headers).status_code == 200
    assert endpoint.client.get("/v1/models", headers={"host": "localhost:80"}).status_code == 200


def test_behind_haproxy_the_client_must_connect_to_haproxy_from_loopback() -> None:
    with run_endpoint(make_config(), behind_haproxy=True) as running:

        def status_for(*peers: str) -> int:
            return running.client.get("/v1/models", headers=[(PEER, peer) for peer in peers]).status_code

        assert status_for("127.0.0.1") == 200
        assert status_for("::1") == 200
        assert status_for() == 403  # without the header the request did not pass through HAProxy
        assert status_for("203.0.113.9") == 403
        assert status_for("127.0.0.1", "203.0.113.9") == 403
        assert status_for("nobody") == 403


def test_requests_beyond_a_full_queue_get_429_and_the_others_succeed(endpoint: Endpoint) -> None:
    limits = {"requests": 4}
    release = threading.Event()
    with run_endpoint(make_config(limits=limits)) as running:
        forward = running.model.actor.encoder._forward
        running.model.actor.encoder._forward = lambda pixels: (release.wait(120), forward(pixels))[1]
        responses: list[httpx.Response] = []

        def classify() -> None:
            responses.append(running.post("/v1/classify", {"image": PNG, "label_set": "shapes"}))

        threads = [threading.Thread(target=classify) for _ in range(4)]
        try:
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + 60
            while running.service.admission.in_flight.requests < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert running.service.admission.in_flight.requests == 4
            for _ in range(20):
                classify()
        finally:
            release.set()
            for thread in threads:
                thread.join()
        for response in responses[:20]:
            assert (response.status_code, error_of(response)["code"]) == (429, "overloaded")
            assert int(response.headers["retry-after"]) >= 1
        assert [response.status_code for response in responses[20:]] == [200] * 4
        assert running.service.admission.in_flight.items == 0


def test_the_schema_documents_every_error_and_its_examples_succeed(endpoint: Endpoint) -> None:
    schema = endpoint.client.get("/openapi.json").json()
    posts = {path: item["post"] for path, item in schema["paths"].items() if "post" in item}
    own = {"/v1/classify", "/v1/similarity", "/v1/search"}
    assert posts.keys() == own | {"/", "/embed", "/v1/embed", "/v1/embeddings", "/v1/moderations", "/v2/embed"}
    documented = {status for post in posts.values() for status in post["responses"]}
    assert documented >= {"200", "400", "401", "403", "404", "408", "413", "415", "429", "500", "503"}
    assert "422" not in documented
    text = json.dumps(schema)
    assert all(f"`{code}`" in text for code in CODES)
    for path, post in posts.items():
        content = post["requestBody"]["content"]["application/json"]["schema"]
        if "$ref" in content:
            content = schema["components"]["schemas"][content["$ref"].rsplit("/", 1)[1]]
        for example in content["examples"]:
            response = endpoint.post(path, example)
            assert response.status_code == 200, (path, example, response.text)


def test_a_body_that_arrives_too_slowly_gets_408(endpoint: Endpoint) -> None:
    def drip() -> Iterator[bytes]:
        yield b"{"
        time.sleep(1.2)
        yield b"}"

    response = endpoint.client.post("/v1/classify", content=drip(), headers={"x-request-timeout-seconds": "0.5"})
    assert (response.status_code, error_of(response)["code"]) == (408, "body_timeout")


def test_a_crashed_decoder_fails_at_most_one_request(endpoint: Endpoint) -> None:
    pool = endpoint.service.decoders
    assert endpoint.post("/v1/classify", {"image": PNG, "label_set": "shapes"}).status_code == 200
    [decoder] = pool._free
    assert decoder.pid is not None
    os.kill(decoder.pid, signal.SIGKILL)
    responses = [endpoint.post("/v1/classify", {"image": PNG, "label_set": "shapes"}).status_code for _ in range(3)]
    assert responses.count(200) >= 2
    assert set(responses) <= {200, 400}


def test_extreme_image_sizes_are_tagged_and_an_unsupported_format_is_refused(endpoint: Endpoint) -> None:
    images = [data_uri(encode(make_rgb(width, height), "JPEG"), "image/jpeg") for width, height in ((1, 1), (9, 400))]
    response = endpoint.post("/v1/classify", {"images": images, "label_set": "shapes", "threshold": 0, "top_k": 64})
    assert [len(item["labels"]) for item in response.json()["data"]] == [64, 64]
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "ICO")
    unknown = endpoint.post("/v1/classify", {"image": data_uri(buffer.getvalue()), "label_set": "shapes"})
    assert error_of(unknown)["code"] == "unsupported"
