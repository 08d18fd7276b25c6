"""The clients of npm, in Node."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from siglip.scoring import Floats
from tests.clients.conftest import LABELS, TEXTS, Served, best_of, close
from tests.support.clients.calls import Client, client_call
from tests.support.clients.worker import ClientError, ClientProcess
from tests.support.endpoint import data_uri, shape_png

OPENAI = Client("OpenAI (Node)", "openai", "node")
HUGGING_FACE = Client("Hugging Face (Node)", "@huggingface/inference", "node")
COHERE = Client("Cohere (Node)", "cohere-ai", "node")
AI_SDK = Client("AI SDK (Node)", "ai", "node", ("@ai-sdk/openai-compatible",))
AI_SDK_OPENAI = Client("AI SDK, for OpenAI (Node)", "ai", "node", ("@ai-sdk/openai",))
AI_SDK_COHERE = Client("AI SDK, for Cohere (Node)", "ai", "node", ("@ai-sdk/cohere",))
LANGCHAIN_COHERE = Client("LangChain, for Cohere (Node)", "@langchain/cohere", "node", ("cohere-ai",))
LANGCHAIN = Client("LangChain (Node)", "@langchain/openai", "node")

PNG = base64.b64encode(shape_png("blue star")).decode()
MANY = 10_000


@pytest.fixture(scope="module")
def at(served: Served) -> dict[str, str]:
    """The options of every call: the address, the key and the model."""
    return options_of(served)


def options_of(served: Served) -> dict[str, str]:
    """The options of calls to an endpoint."""
    return {"url": served.url, "key": served.key, "model": "tiny"}


def check_rate_limit(error: ClientError) -> None:
    """Check that a client says what the server said, and when to try again."""
    assert "1 requests a minute" in str(error)
    assert error.status == 429
    assert error.retry_after is not None
    assert 0 < int(error.retry_after) <= 60


@client_call(OPENAI, "`embeddings.create({ input: text })`", "the client asks for base64 by itself")
def test_openai_embeds_one_text(node: ClientProcess, at: dict[str, str], vectors: Floats) -> None:
    found = node.call("openai", "embed", **at, request={"model": "tiny", "input": TEXTS[0]})
    close(found["vectors"], vectors[:1])
    assert found["model"] == "tiny"
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] > 0


@client_call(OPENAI, "`embeddings.create({ input: [text, ..., image] })`", "an image is a data: URI")
@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_openai_embeds_texts_and_images(
    node: ClientProcess, at: dict[str, str], vectors: Floats, image: str, encoding: dict[str, str]
) -> None:
    request = {"model": "tiny", "input": [*TEXTS, image], **encoding}
    found = node.call("openai", "embed", **at, request=request)["vectors"]
    if "base64" in encoding.values():
        found = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in found]
    close(found, vectors)


@client_call(OPENAI, "`embeddings.create({ dimensions: 64 })`", refused="cannot be shortened")
def test_openai_is_told_that_embeddings_have_one_width(node: ClientProcess, at: dict[str, str]) -> None:
    node.call("openai", "embed", **at, request={"model": "tiny", "input": "a", "dimensions": 64})


@client_call(OPENAI, "`models.list()`")
def test_openai_lists_models(node: ClientProcess, at: dict[str, str]) -> None:
    assert node.call("openai", "listModels", **at) == ["tiny"]


@client_call(OPENAI, "`moderations.create({ input: [image_url, ...], labels })`", "one result for each image")
def test_openai_scores_labels_of_images(node: ClientProcess, at: dict[str, str], image: str) -> None:
    """The client passes the field `labels`, which OpenAI's own API does not have, on."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in (image, data_uri(shape_png("red circle")))]
    request = {"model": "tiny", "input": pictures, "labels": LABELS}
    results = node.call("openai", "moderate", **at, request=request)["results"]
    assert [best_of(result["category_scores"]) for result in results] == ["blue star", "red circle"]
    for result in results:
        scores = result["category_scores"]
        assert result["categories"] == {label: scores[label] >= 0.5 for label in LABELS}
        assert result["flagged"] == any(result["categories"].values())


@client_call(
    OPENAI, '`moderations.create({ model: "tiny:shapes", input: image })`', "`shapes` is a registered label set"
)
def test_openai_scores_a_registered_label_set(node: ClientProcess, at: dict[str, str], image: str) -> None:
    [result] = node.call("openai", "moderate", **at, request={"model": "tiny:shapes", "input": image})["results"]
    assert best_of(result["category_scores"]) == "blue star"
    assert len(result["category_scores"]) == 64
    assert result["categories"]["blue star"]


@client_call(OPENAI, "`moderations.create({ input: image })` without labels", refused="labels")
def test_openai_is_told_that_labels_are_needed(node: ClientProcess, at: dict[str, str], image: str) -> None:
    node.call("openai", "moderate", **at, request={"model": "tiny", "input": image})


@client_call(OPENAI, '`post("/classify", { body: { image, labels } })`', "the full answer of `/v1/classify`")
def test_openai_posts_to_classify(node: ClientProcess, at: dict[str, str], image: str) -> None:
    found = node.call("openai", "classify", **at, request={"image": image, "labels": LABELS, "top_k": 1})
    assert [one["label"] for one in found["data"][0]["labels"]] == ["blue star"]


@client_call(OPENAI, "errors", "`BadRequestError`, `NotFoundError`, `AuthenticationError` and `RateLimitError`")
def test_openai_raises_its_own_errors(node: ClientProcess, at: dict[str, str], limited: Served) -> None:
    def fail(options: dict[str, str], **request: object) -> ClientError:
        with pytest.raises(ClientError) as raised:
            node.call("openai", "embed", **options, request={"model": "tiny", "input": "a", **request})
        return raised.value

    bad = fail(at, dimensions=64)
    assert (bad.type, bad.status, bad.code, bad.param) == (
        "BadRequestError",
        400,
        "unsupported_dimensions",
        "dimensions",
    )
    missing = fail(at, model="text-embedding-3-small")
    assert (missing.type, missing.status, missing.code) == ("NotFoundError", 404, "model_not_found")
    unknown = fail({**at, "key": "sl-wrong"})
    assert (unknown.type, unknown.status, unknown.code) == ("AuthenticationError", 401, "invalid_api_key")
    often = fail(options_of(limited))
    assert (often.type, often.code) == ("RateLimitError", "rate_limit_exceeded")
    check_rate_limit(often)


@client_call(HUGGING_FACE, "`zeroShotImageClassification({ inputs: blob })` with `endpointUrl`")
def test_hugging_face_classifies_an_image(node: ClientProcess, at: dict[str, str]) -> None:
    found = node.call("huggingface", "classifyImage", **at, image=PNG, labels=LABELS)
    assert found[0]["label"] == "blue star"
    assert {one["label"] for one in found} == set(LABELS)
    assert found == node.call("huggingface", "classifyImage", **at, image=PNG, labels=LABELS, wrapped=True)


@client_call(HUGGING_FACE, "`featureExtraction({ inputs: text })`, `featureExtraction({ inputs: texts })`")
def test_hugging_face_embeds_texts(node: ClientProcess, at: dict[str, str], vectors: Floats) -> None:
    close(node.call("huggingface", "extractFeatures", **at, inputs=TEXTS), vectors[:3])
    close(np.ravel(node.call("huggingface", "extractFeatures", **at, inputs=TEXTS[0])), vectors[0])
    options = {"normalize": True, "truncate": True}
    close(node.call("huggingface", "extractFeatures", **at, inputs=TEXTS, extra=options), vectors[:3])


@client_call(HUGGING_FACE, "`featureExtraction({ normalize: false })`", refused="embeddings always have unit norm")
def test_hugging_face_is_told_that_embeddings_have_unit_norm(node: ClientProcess, at: dict[str, str]) -> None:
    node.call("huggingface", "extractFeatures", **at, inputs="a", extra={"normalize": False})


@client_call(HUGGING_FACE, "errors", "`ProviderApiError` with the status and the server's body")
def test_hugging_face_raises_its_own_errors(node: ClientProcess, at: dict[str, str], limited: Served) -> None:
    with pytest.raises(ClientError, match="this API key is not known") as unknown:
        node.call("huggingface", "extractFeatures", **{**at, "key": "sl-wrong"}, inputs="a")
    assert (unknown.value.type, unknown.value.status) == ("ProviderApiError", 401)
    with pytest.raises(ClientError) as often:
        node.call("huggingface", "extractFeatures", **options_of(limited), inputs="a")
    assert often.value.status == 429
    assert "1 requests a minute" in str(often.value)


@client_call(COHERE, "`CohereClient.embed({ texts })` (Cohere's first API)")
def test_cohere_embeds_texts_by_the_first_api(node: ClientProcess, at: dict[str, str], vectors: Floats) -> None:
    request = {"model": "tiny", "inputType": "search_document", "texts": TEXTS}
    close(node.call("cohere", "embedV1", **at, request=request)["embeddings"], vectors[:3])
    typed = node.call("cohere", "embedV1", **at, request={**request, "embeddingTypes": ["float", "int8"]})
    close(typed["embeddings"]["float"], vectors[:3])
    assert np.shape(typed["embeddings"]["int8"]) == (3, 128)


@client_call(COHERE, "`CohereClient.embed({ images })`")
def test_cohere_embeds_an_image_by_the_first_api(
    node: ClientProcess, at: dict[str, str], vectors: Floats, image: str
) -> None:
    request = {"model": "tiny", "inputType": "image", "images": [image], "embeddingTypes": ["float"]}
    close(node.call("cohere", "embedV1", **at, request=request)["embeddings"]["float"], vectors[3:])


@client_call(COHERE, "`CohereClientV2.embed({ texts })`")
def test_cohere_embeds_texts(node: ClientProcess, at: dict[str, str], vectors: Floats) -> None:
    request = {"model": "tiny", "inputType": "search_query", "texts": TEXTS, "embeddingTypes": ["float", "ubinary"]}
    found = node.call("cohere", "embedV2", **at, request=request)["embeddings"]
    close(found["float"], vectors[:3])
    np.testing.assert_array_equal(np.unpackbits(np.asarray(found["ubinary"], np.uint8), axis=1), vectors[:3] > 0)


@client_call(COHERE, "`CohereClientV2.embed({ images })`, `embed({ inputs })`")
def test_cohere_embeds_an_image(node: ClientProcess, at: dict[str, str], vectors: Floats, image: str) -> None:
    request = {"model": "tiny", "inputType": "image", "embeddingTypes": ["float"]}
    found = node.call("cohere", "embedV2", **at, request={**request, "images": [image]})
    close(found["embeddings"]["float"], vectors[3:])
    inputs = [{"content": [{"type": "image_url", "imageUrl": {"url": image}}]}]
    found = node.call("cohere", "embedV2", **at, request={**request, "inputs": inputs})
    close(found["embeddings"]["float"], vectors[3:])


@client_call(COHERE, "errors", "`UnauthorizedError`, `BadRequestError`, `TooManyRequestsError`")
def test_cohere_raises_its_own_errors(node: ClientProcess, at: dict[str, str], limited: Served) -> None:
    request = {"model": "tiny", "inputType": "search_query", "texts": ["a"], "embeddingTypes": ["float"]}

    def fail(options: dict[str, str], **change: object) -> ClientError:
        with pytest.raises(ClientError) as raised:
            node.call("cohere", "embedV2", **options, request={**request, **change})
        return raised.value

    unknown = fail({**at, "key": "sl-wrong"})
    assert (unknown.type, unknown.status) == ("UnauthorizedError", 401)
    assert "this API key is not known" in str(unknown)
    bad = fail(at, outputDimension=64)
    assert (bad.type, bad.status) == ("BadRequestError", 400)
    assert "cannot be shortened" in str(bad)
    often = fail(options_of(limited))
    assert often.type == "TooManyRequestsError"
    check_rate_limit(often)


@client_call(AI_SDK, "`embed({ value: text })`, `embed({ value: image })`", "an image is a data: URI")
def test_the_ai_sdk_embeds_one_value(node: ClientProcess, at: dict[str, str], vectors: Floats, image: str) -> None:
    text = node.call("ai_sdk", "embedOne", **at, value=TEXTS[1])
    close(text["embedding"], vectors[1])
    assert text["usage"]["tokens"] > 0
    close(node.call("ai_sdk", "embedOne", **at, value=image)["embedding"], vectors[3])


@client_call(AI_SDK, "`embedMany({ values })`")
def test_the_ai_sdk_embeds_several_values(node: ClientProcess, at: dict[str, str], vectors: Floats, image: str) -> None:
    close(node.call("ai_sdk", "embedAll", **at, values=[*TEXTS, image])["embeddings"], vectors)


@client_call(AI_SDK, f"`embedMany` with {MANY:,} texts", "the client sends 2,048 texts in a call, five calls at once")
def test_the_ai_sdk_embeds_more_texts_than_fit_in_a_call(
    node: ClientProcess, at: dict[str, str], served: Served
) -> None:
    indices = [0, 2047, 2048, 6000, MANY - 1]
    found = node.call("ai_sdk", "embedNumbers", **at, count=MANY, indices=indices)
    assert found["count"] == MANY
    close(found["chosen"], served.embed(*(f"number {index}" for index in indices)))


@client_call(AI_SDK, "errors", "`AI_APICallError`; it repeats 429 and 503 by itself")
def test_the_ai_sdk_raises_its_own_errors(node: ClientProcess, at: dict[str, str], limited: Served) -> None:
    with pytest.raises(ClientError, match="this API key is not known") as unknown:
        node.call("ai_sdk", "embedOne", **{**at, "key": "sl-wrong"}, value="a")
    assert (unknown.value.type, unknown.value.status, unknown.value.retryable) == ("AI_APICallError", 401, False)
    with pytest.raises(ClientError) as often:
        node.call("ai_sdk", "embedOne", **options_of(limited), value="a", extra={"maxRetries": 0})
    assert (often.value.type, often.value.retryable) == ("AI_APICallError", True)
    check_rate_limit(often.value)


@client_call(LANGCHAIN, "`OpenAIEmbeddings.embedQuery(text)`, `embedDocuments(texts)`", "n8n and Flowise use it")
def test_langchain_embeds_texts(node: ClientProcess, at: dict[str, str], vectors: Floats, image: str) -> None:
    close(node.call("langchain", "embedQuery", **at, text=TEXTS[0]), vectors[0])
    close(node.call("langchain", "embedDocuments", **at, texts=[*TEXTS, image]), vectors)
    floats = {"encodingFormat": "float"}
    close(node.call("langchain", "embedDocuments", **at, texts=TEXTS, extra=floats), vectors[:3])


@client_call(LANGCHAIN_COHERE, "`CohereEmbeddings({ client }).embedDocuments(texts)`", "`client` is a `CohereClient`")
def test_langchain_embeds_texts_for_cohere(node: ClientProcess, at: dict[str, str], vectors: Floats) -> None:
    close(node.call("langchain", "embedDocumentsWithCohere", **at, texts=TEXTS), vectors[:3])


@client_call(AI_SDK_OPENAI, "`embedMany({ values })` with `createOpenAI({ baseURL })`")
def test_the_ai_sdk_embeds_for_openai(node: ClientProcess, at: dict[str, str], vectors: Floats, image: str) -> None:
    values = [*TEXTS, image]
    close(node.call("ai_sdk", "embedAll", **at, provider="openai", values=values)["embeddings"], vectors)


@client_call(AI_SDK_COHERE, '`embedMany({ values })` with `createCohere({ baseURL: "http://HOST:8000/v2" })`')
def test_the_ai_sdk_embeds_for_cohere(node: ClientProcess, at: dict[str, str], vectors: Floats) -> None:
    close(node.call("ai_sdk", "embedAll", **at, provider="cohere", values=TEXTS)["embeddings"], vectors[:3])
