"""Requests in the formats of other embedding servers, some of them sent by LangChain and Cohere clients."""

from __future__ import annotations

import base64
import gzip
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings
from pydantic import SecretStr

from serve.tokens import TokenVocabulary
from storage.settings import ConfigError
from tests.support.cross_origin import check_cross_origin
from tests.support.endpoint import Endpoint, data_uri, make_config, run_endpoint, shape_png

PNG = shape_png("blue star")
URI = data_uri(PNG)
LABELS = ["red circle", "blue star", "green ring"]


@pytest.fixture(scope="module")
def vocabulary() -> Path:
    """OpenAI's vocabulary cl100k_base. llama-index-core contains it under the file name that tiktoken's cache uses."""
    import llama_index.core

    return (
        Path(str(llama_index.core.__file__)).parent / "_static/tiktoken_cache/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
    )


@pytest.fixture(scope="module")
def endpoint(vocabulary: Path) -> Iterator[Endpoint]:
    label_sets = {"strict": {"names": LABELS, "threshold": 0.999}}
    cors = {"origins": ["https://app.example"]}
    config = make_config(label_sets=label_sets, token_vocabulary=vocabulary, cors=cors, limits={"body_bytes": 2**20})
    with run_endpoint(config) as running:
        yield running


def vectors_of(response: httpx.Response) -> np.ndarray:
    """Return the embeddings in a successful response, (number of inputs, width) float32."""
    assert response.status_code == 200, response.text
    return np.asarray([item["embedding"] for item in response.json()["data"]], np.float32)


def code_of(response: httpx.Response) -> tuple[int, str]:
    """Return the HTTP status and the error's code."""
    return response.status_code, response.json()["error"]["code"]


@pytest.fixture(scope="module")
def image(endpoint: Endpoint) -> np.ndarray:
    return vectors_of(endpoint.post("/v1/embeddings", {"model": "tiny", "input": URI}))


@pytest.fixture(scope="module")
def text(endpoint: Endpoint) -> np.ndarray:
    return vectors_of(
        endpoint.post("/v1/embeddings", {"model": "tiny", "input": "a blue star", "encoding_format": None})
    )


def test_token_ids_from_langchain_give_the_embedding_of_the_text(
    endpoint: Endpoint, text: np.ndarray, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabulary.parent))  # so that tiktoken does not download it
    client = OpenAIEmbeddings(model="tiny", openai_api_base=f"{endpoint.url}/v1", openai_api_key=SecretStr("-"))
    np.testing.assert_allclose([client.embed_query("a blue star")], text, atol=1e-5)
    documents = client.embed_documents(["a blue star", "rød sirkel, 東京"])
    assert np.shape(documents) == (2, 128)
    np.testing.assert_allclose(documents[:1], text, atol=1e-5)


def test_token_ids_of_an_image_are_the_image(
    endpoint: Endpoint, image: np.ndarray, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabulary.parent))
    client = OpenAIEmbeddings(model="tiny", openai_api_base=f"{endpoint.url}/v1", openai_api_key=SecretStr("-"))
    np.testing.assert_allclose([client.embed_query(URI)], image, atol=1e-5)


def test_half_characters_at_the_ends_of_token_ids_are_dropped_and_others_refused(
    endpoint: Endpoint, vocabulary: Path
) -> None:
    words = {
        base64.b64decode(word): int(number) for word, number in map(bytes.split, vocabulary.read_bytes().splitlines())
    }

    def ids(text: bytes) -> list[int]:
        return [words[bytes([byte])] for byte in text]

    whole = "東京".encode()
    assert TokenVocabulary(vocabulary).decode(ids(whole)) == "東京"
    assert TokenVocabulary(vocabulary).decode(ids(whole[1:-1])) == ""
    assert TokenVocabulary(vocabulary).decode(ids(whole[2:] + b" a" + whole[:2])) == "京 a"
    for broken in (b"a" + whole[:2] + b"b", b"a" + whole[1:], b"\xff\xff"):
        response = endpoint.post("/v1/embeddings", {"model": "tiny", "input": [ids(broken)]})
        assert code_of(response) == (400, "unsupported_input")


def test_unknown_token_ids_and_invalid_vocabulary_files_are_refused(endpoint: Endpoint, tmp_path: Path) -> None:
    response = endpoint.post("/v1/embeddings", {"model": "tiny", "input": [[10**9]]})
    assert code_of(response) == (400, "unsupported_input")
    for wrong in ([True, 5], [[True]], [[1.0]], [["1"]]):
        assert endpoint.post("/v1/embeddings", {"model": "tiny", "input": wrong}).status_code == 400, wrong
    for content in ("a b c\n", "YQ==\n", "*** 1\n"):
        (tmp_path / "vocabulary").write_text(content)
        with pytest.raises(ConfigError, match=r"token_vocabulary: .*tiktoken"):
            TokenVocabulary(tmp_path / "vocabulary")
    with pytest.raises(ConfigError, match="No such file"):
        TokenVocabulary(tmp_path / "nothing")


def test_one_request_may_have_2048_texts_and_no_more(endpoint: Endpoint) -> None:
    texts = [f"number {n}" for n in range(2048)]
    response = endpoint.client.post("/v1/embeddings", json={"model": "tiny", "input": texts}, timeout=120)
    assert len(vectors_of(response)) == 2048
    refused = endpoint.post("/v1/embeddings", {"model": "tiny", "input": [*texts, "one more"]})
    assert code_of(refused) == (400, "too_many_texts")


def test_an_image_may_be_the_body_or_a_file_of_a_form(endpoint: Endpoint, image: np.ndarray) -> None:
    client = endpoint.client
    raw = client.post("/v1/embeddings?model=tiny", content=PNG, headers={"content-type": "image/png"})
    np.testing.assert_allclose(vectors_of(raw), image, atol=2e-6)
    files = [("image", ("a.png", PNG)), ("image", ("b.png", PNG))]
    form = client.post("/v1/embeddings", files=files, data={"model": "tiny", "encoding_format": "base64"})
    vectors = [base64.b64decode(item["embedding"]) for item in form.json()["data"]]
    np.testing.assert_allclose([np.frombuffer(one, "<f4") for one in vectors], np.repeat(image, 2, 0), atol=2e-6)
    labels = [("labels", label) for label in LABELS]
    classified = client.post(
        "/v1/classify", params=[*labels, ("top_k", "1")], content=PNG, headers={"content-type": "image/png"}
    )
    assert [one["label"] for one in classified.json()["data"][0]["labels"]] == ["blue star"]
    wrong = client.post("/v1/embeddings?encoding_format=int4", content=PNG, headers={"content-type": "image/png"})
    assert code_of(wrong) == (400, "invalid_request")
    broken = client.post("/v1/embeddings", content=PNG[:40], headers={"content-type": "image/png"})
    assert broken.status_code == 400
    assert broken.json()["error"]["param"] == "image.0"
    assert code_of(client.post("/v1/embeddings", content=b"x", headers={"content-type": "text/plain"}))[0] == 415


def test_paths_of_infinity_are_served(endpoint: Endpoint, image: np.ndarray) -> None:
    response = endpoint.post("/embeddings", {"model": "tiny", "input": [URI], "modality": "image"})
    np.testing.assert_allclose(vectors_of(response), image, atol=2e-6)
    assert endpoint.client.get("/models").json()["data"][0]["id"] == "tiny"
    assert endpoint.client.get("/health").status_code == 200


def test_paths_of_text_embeddings_inference_are_served(endpoint: Endpoint, text: np.ndarray) -> None:
    response = endpoint.post("/embed", {"inputs": ["a blue star"], "normalize": True, "truncate": True})
    np.testing.assert_allclose(response.json(), text, atol=2e-6)
    assert np.shape(endpoint.post("/embed", {"inputs": "a"}).json()) == (1, 128)
    assert code_of(endpoint.post("/embed", {"inputs": []})) == (400, "invalid_request")
    assert code_of(endpoint.post("/embed", {"inputs": "a", "normalize": False})) == (400, "invalid_request")
    info = endpoint.client.get("/info").json()
    assert (info["model_id"], info["max_client_batch_size"], info["max_input_length"]) == ("tiny", 2048, 16)
    assert info["auto_truncate"] is True


def test_the_other_request_formats_of_hugging_face_are_accepted(
    endpoint: Endpoint, image: np.ndarray, text: np.ndarray
) -> None:
    by_commas = endpoint.post(
        "/", {"inputs": URI, "parameters": {"candidate_labels": "red circle, blue star,green ring"}}
    )
    assert by_commas.json()[0]["label"] == "blue star"
    assert len(by_commas.json()) == 3
    np.testing.assert_allclose(endpoint.post("/", {"inputs": "a blue star", "parameters": {}}).json(), text, atol=2e-6)
    png = {"content-type": "image/png"}
    raw = endpoint.client.post("/", params={"candidate_labels": ",".join(LABELS)}, content=PNG, headers=png)
    assert raw.json()[0]["label"] == "blue star"
    np.testing.assert_allclose(endpoint.client.post("/", content=PNG, headers=png).json(), image, atol=2e-6)
    no_labels = endpoint.post("/", {"inputs": URI, "parameters": {"candidate_labels": " , "}})
    assert code_of(no_labels) == (400, "invalid_request")


def test_openais_client_never_reads_other_numbers_as_float32(endpoint: Endpoint) -> None:
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="-", max_retries=0) as client:
        for option in ({"output_dtype": "int8"}, {"embed_dtype": "float16"}, {"endianness": "big"}):
            with pytest.raises(openai.BadRequestError, match="encoding_format=float"):
                client.embeddings.create(model="tiny", input="a", extra_body=option)
        options = {"output_dtype": "int8"}
        listed = client.embeddings.create(model="tiny", input="a", encoding_format="float", extra_body=options)
        assert max(map(abs, listed.data[0].embedding)) == 127


@pytest.fixture
def moderations(endpoint: Endpoint) -> Iterator[Any]:
    """OpenAI's client for moderations."""
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="-", max_retries=0) as client:
        yield client.moderations


def image_part(label: str) -> Any:
    """An image of a shape as OpenAI's clients send it."""
    return {"type": "image_url", "image_url": {"url": data_uri(shape_png(label))}}


def test_openais_moderations_give_the_scores_of_classify(endpoint: Endpoint, moderations: Any) -> None:
    response = moderations.create(
        model="tiny", input=[image_part("blue star"), image_part("red circle")], extra_body={"labels": LABELS}
    )
    assert (response.model, len(response.results)) == ("tiny", 2)
    assert response.id.startswith("modr-")
    for result, wanted in zip(response.results, ("blue star", "red circle"), strict=True):
        found = result.to_dict()
        assert found["flagged"] is True
        assert found["categories"] == {label: label == wanted for label in LABELS}
        assert found["category_applied_input_types"] == {label: ["image"] for label in LABELS}
        assert found["category_thresholds"] == dict.fromkeys(LABELS, 0.5)
        images = {"image": data_uri(shape_png(wanted)), "labels": LABELS}
        [classified] = endpoint.post("/v1/classify", images).json()["data"]
        expected = {one["label"]: one["score"] for one in classified["labels"]}
        assert list(found["category_scores"]) == LABELS, "all labels, in the order of the request"
        assert found["category_scores"] == pytest.approx(expected, abs=1e-5)
    strict = moderations.create(
        model="tiny", input=[image_part("blue star")], extra_body={"labels": LABELS, "threshold": 1}
    )
    assert strict.results[0].flagged is False
    exclusive = moderations.create(
        model="tiny",
        input=[image_part("blue star")],
        extra_body={"labels": LABELS, "activation": "softmax", "templates": ["a photo of a {label}", "{label}"]},
    )
    assert sum(exclusive.results[0].to_dict()["category_scores"].values()) == pytest.approx(1, abs=1e-5)


def test_openais_moderations_take_a_registered_label_set_by_name_or_in_the_model(moderations: Any) -> None:
    by_model = moderations.create(model="tiny:strict", input=[image_part("blue star")]).to_dict()
    by_field = moderations.create(input=URI, extra_body={"label_set": "strict"}).to_dict()
    assert by_model["label_set"] == by_field["label_set"] == "strict"
    assert by_model["results"] == by_field["results"]
    assert by_model["results"][0]["category_thresholds"] == dict.fromkeys(LABELS, pytest.approx(0.999))
    assert by_model["fingerprint"]["labels"]


@pytest.mark.parametrize("form", ["string", "list", "base64", "part", "url string"])
def test_openais_moderations_take_every_form_of_an_image(moderations: Any, form: str) -> None:
    plain = base64.b64encode(PNG).decode()
    given: Any = {
        "string": URI,
        "list": [URI],
        "base64": plain,
        "part": {"type": "image_url", "image_url": plain},
        "url string": [{"type": "image_url", "image_url": URI}],
    }[form]
    response = moderations.create(model="tiny", input=given, extra_body={"labels": LABELS})
    assert response.results[0].to_dict()["categories"]["blue star"] is True


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"input": "how to hurt somebody", "labels": LABELS}, 400, "input", "a text"),
        ({"input": [URI, {"type": "text", "text": "a"}], "labels": LABELS}, 400, "input.1", "a text"),
        ({"input": {"type": "image_url", "text": "a", "image_url": URI}, "labels": LABELS}, 400, "input", "alone"),
        ({"input": [{"type": "image_url"}], "labels": LABELS}, 400, "input.0", "without image_url"),
        ({"input": "https://example.com/cat", "labels": LABELS}, 400, "input", "URL"),
        ({"input": URI}, 400, "labels", "extra_body"),
        ({"input": URI, "labels": LABELS, "label_set": "strict"}, 400, "labels", "exactly one"),
        ({"input": URI, "labels": LABELS, "top_k": 1}, 400, "top_k", "all labels"),
        ({"input": URI, "labels": LABELS, "treshold": 0.1}, 400, "treshold", "no such field"),
        ({"input": [], "labels": LABELS}, 400, "input", ""),
        ({"labels": LABELS}, 400, "input", ""),
        ({"input": URI, "labels": [URI]}, 400, "labels", "image"),
        ({"input": URI, "model": "tiny:none"}, 404, "label_set", "none"),
        ({"input": URI, "model": "tiny:strict", "label_set": "other"}, 400, "label_set", "another"),
        ({"input": URI, "model": "omni-moderation-latest", "labels": LABELS}, 404, "model", "omni"),
    ],
)
def test_moderations_that_cannot_be_done_are_refused(
    endpoint: Endpoint, body: dict[str, Any], status: int, param: str, words: str
) -> None:
    for path in ("/v1/moderations", "/moderations"):
        response = endpoint.post(path, body)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert words in error["message"]


def test_coheres_int8_and_binary_types_are_the_rounded_embedding(endpoint: Endpoint, image: np.ndarray) -> None:
    with httpx.Client() as http:
        client = cohere.ClientV2(api_key="-", base_url=endpoint.url, httpx_client=http)
        types: list[Any] = ["float", "int8", "uint8", "binary", "ubinary"]
        response = client.embed(model="tiny", input_type="image", images=[URI], embedding_types=types).embeddings
    levels, small, signed, plain = (
        np.asarray(getattr(response, name)[0]) for name in ("int8", "uint8", "binary", "ubinary")
    )
    assert (np.abs(levels).max(), len(levels)) == (127, 128)
    assert (levels @ image[0]) / np.linalg.norm(levels) > 0.9999
    assert (small - 128 == levels).all()
    assert (np.unpackbits(plain.astype(np.uint8)) == (image[0] > 0)).all()
    assert (signed + 128 == plain).all()


def test_softmax_ignores_the_sigmoid_threshold_of_the_label_set(endpoint: Endpoint) -> None:
    body = {"image": URI, "label_set": "strict"}
    [plain] = endpoint.post("/v1/classify", body).json()["data"]
    [exclusive] = endpoint.post("/v1/classify", {**body, "activation": "softmax"}).json()["data"]
    assert len(plain["labels"]) < 3
    assert len(exclusive["labels"]) == 3
    assert sum(one["score"] for one in exclusive["labels"]) == pytest.approx(1, abs=1e-5)
    [filtered] = endpoint.post("/v1/classify", {**body, "activation": "softmax", "threshold": 0.5}).json()["data"]
    assert len(filtered["labels"]) == 1


def test_compressed_bodies_are_read_up_to_the_limit_of_decompressed_bytes(endpoint: Endpoint, text: np.ndarray) -> None:
    body = json.dumps({"model": "tiny", "input": "a blue star"}).encode()

    def send(data: bytes, encoding: str = "gzip") -> httpx.Response:
        headers = {"content-type": "application/json", "content-encoding": encoding}
        return endpoint.client.post("/v1/embeddings", content=data, headers=headers)

    np.testing.assert_allclose(vectors_of(send(gzip.compress(body))), text, atol=2e-6)
    np.testing.assert_allclose(vectors_of(send(body, "identity")), text, atol=2e-6)
    bomb = gzip.compress(bytes(200 * 2**20))
    assert len(bomb) < 2**20, "compressed, the body must be smaller than the limit"
    assert code_of(send(bomb)) == (413, "body_too_large")
    assert code_of(send(gzip.compress(body)[:-9])) == (400, "invalid_request")
    assert code_of(send(body)) == (400, "invalid_request")
    assert code_of(send(zlib.compress(body), "br")) == (415, "unsupported_media_type")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/health"])
def test_health_paths_respond_to_head(endpoint: Endpoint, path: str) -> None:
    response = endpoint.client.head(path)
    assert (response.status_code, response.content) == (200, b"")


def test_only_the_origins_in_the_config_get_cors_headers(endpoint: Endpoint) -> None:
    check_cross_origin(endpoint.client)
    with run_endpoint(make_config()) as without_cors:
        other = without_cors.client.get("/v1/models", headers={"origin": "https://app.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_changed_label_set_file_is_read_again_and_an_invalid_one_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "labels.yaml"
    path.write_text("names: [red circle, green ring]\n")
    label_sets = {"mine": str(path), "also": {"names": str(path), "threshold": 0.2}}
    with run_endpoint(make_config(label_sets=label_sets)) as running:

        def names(label_set: str = "mine") -> list[str]:
            [found] = [one for one in running.client.get("/v1/label-sets").json()["data"] if one["id"] == label_set]
            return list(found["labels"])

        def wait_for(wanted: list[str]) -> None:
            end = time.monotonic() + 120
            while names() != wanted or names("also") != wanted:
                assert time.monotonic() < end, names()
                time.sleep(0.1)

        assert names() == ["red circle", "green ring"]
        other = tmp_path / "other.yaml"
        other.write_text("names: [red circle, blue star]\n")
        other.replace(path)
        wait_for(["red circle", "blue star"])
        [response] = running.post("/v1/classify", {"image": URI, "label_set": "mine", "top_k": 1}).json()["data"]
        assert response["labels"][0]["label"] == "blue star"
        for number, bad in enumerate(("names: [", "names: [a, A]\n", "names: []\n", ""), start=1):
            path.write_text(bad)
            end = time.monotonic() + 120
            while sum("cannot be used" in record.message for record in caplog.records) < 2 * number:
                assert time.monotonic() < end, bad
                time.sleep(0.05)
            assert names() == ["red circle", "blue star"], bad
        path.unlink()
        time.sleep(2.5)
        assert names() == ["red circle", "blue star"]
        path.write_text("names: [black cross]\n")
        wait_for(["black cross"])
