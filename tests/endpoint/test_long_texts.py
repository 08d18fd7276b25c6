"""Texts that are longer than the model's input: cut, and said so, or refused if the request says not to cut them."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from llama_index.core.node_parser import SentenceSplitter
from llama_index.embeddings.openai import OpenAIEmbedding

from tests.support.endpoint import Endpoint, data_uri, make_config, run_endpoint, shape_png

LONG = "a photo of a red circle " * 40
HEADER = "x-sightline-truncated"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with run_endpoint(make_config()) as running:
        yield running


def embed(endpoint: Endpoint, *texts: str) -> httpx.Response:
    """Send texts to /v1/embeddings."""
    return endpoint.post("/v1/embeddings", {"model": "tiny", "input": list(texts)})


def test_long_texts_are_cut_and_counted(endpoint: Endpoint) -> None:
    response = embed(endpoint, "a red circle", LONG, LONG * 100)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["truncated_texts"] == 2
    assert response.headers[HEADER] == "2"
    assert response.json()["usage"]["prompt_tokens"] < 3 * 16
    short = embed(endpoint, "a red circle")
    assert HEADER not in short.headers
    assert short.json()["usage"]["truncated_texts"] == 0
    _, first, second = (item["embedding"] for item in response.json()["data"])
    np.testing.assert_allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("text", ["x" * 4_000_000, "photo " * 700_000, "\n" * 100_000 + "circle", "東京" * 100_000])
def test_megabytes_of_one_text_are_read_up_to_the_models_input(endpoint: Endpoint, text: str) -> None:
    response = endpoint.post("/v1/embeddings", {"model": "tiny", "input": [text, "a"], "modality": "text"})
    if text.startswith("\n"):
        assert response.status_code == 400
        assert "nothing of its first 8192 characters" in response.json()["error"]["message"]
        return
    assert response.status_code == 200, response.text
    assert response.headers[HEADER] == "1"


def test_long_texts_of_every_text_field_are_counted(endpoint: Endpoint) -> None:
    image = data_uri(shape_png())
    similarity = endpoint.post("/v1/similarity", {"texts": ["a", LONG], "images": [image]})
    assert similarity.json()["usage"]["truncated_texts"] == 1
    for path, body in {
        "/embed": {"inputs": LONG},
        "/": {"inputs": [LONG, "a"]},
        "/v2/embed": {"model": "tiny", "texts": [LONG]},
    }.items():
        response = endpoint.post(path, body)
        assert (response.status_code, response.headers.get(HEADER)) == (200, "1"), path


def test_long_labels_and_templates_are_counted_also_when_they_are_cached(endpoint: Endpoint) -> None:
    image = data_uri(shape_png())
    long = "a red circle that is somewhere in the middle of a very long label"
    for _ in range(2):
        response = endpoint.post("/v1/classify", {"image": image, "labels": ["a red circle", long]})
        assert (response.status_code, response.headers[HEADER]) == (200, "1"), response.text
        assert response.json()["usage"]["truncated_texts"] == 1
    templates = ["{label} " + "and so on " * 10, "{label}"]
    response = endpoint.post("/v1/classify", {"image": image, "labels": ["circle", "star"], "templates": templates})
    assert response.headers[HEADER] == "2"
    parameters = {"candidate_labels": ["circle", long]}
    assert endpoint.post("/", {"inputs": image, "parameters": parameters}).headers[HEADER] == "1"
    body = {"input": image, "labels": ["circle", long]}
    assert endpoint.post("/v1/moderations", body).headers[HEADER] == "1"


def test_thousands_of_long_texts_with_many_commas_are_embedded(endpoint: Endpoint) -> None:
    prose = 'First, second, third, [fourth], {fifth}, and "sixth\\", as one says. ' * 60
    body = {"model": "tiny", "input": [prose] * 1000}
    assert prose.count(",") * 1000 > 200_000
    response = endpoint.client.post("/v1/embeddings", json=body, timeout=120)
    assert response.status_code == 200, response.text
    assert response.headers[HEADER] == "1000"
    for many in ("[" + ",".join(["1"] * 250_000) + "]", "[" + ",".join(['""'] * 250_000) + "]"):
        headers = {"content-type": "application/json"}
        refused = endpoint.client.post("/v1/embeddings", content=many, headers=headers)
        assert "commas, brackets and braces" in refused.json()["error"]["message"]


def test_default_chunks_of_llama_index_are_embedded(endpoint: Endpoint) -> None:
    chunks = SentenceSplitter().split_text("The quick brown fox jumps over the lazy dog, again and again. " * 600)
    assert max(map(len, chunks)) > 4096
    client = OpenAIEmbedding(model_name="tiny", api_base=f"{endpoint.url}/v1", api_key="-", max_retries=0)
    assert np.shape(client.get_text_embedding_batch(chunks)) == (len(chunks), 128)
