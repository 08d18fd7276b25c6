"""The Python clients of the project's own environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cohere
import httpx
import huggingface_hub
import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from pydantic import SecretStr

from siglip.scoring import Floats
from tests.clients.conftest import LABELS, TEXTS, Served, best_of, close
from tests.support.clients.calls import Client, client_call
from tests.support.endpoint import data_uri, shape_png

OPENAI = Client("OpenAI (Python)", "openai")
HUGGING_FACE = Client("Hugging Face (Python)", "huggingface_hub")
COHERE = Client("Cohere (Python)", "cohere")
LANGCHAIN = Client("LangChain (Python)", "langchain-openai")
LLAMA_INDEX = Client("LlamaIndex", "llama-index-embeddings-openai")
LLAMA_INDEX_TEI = Client(
    "LlamaIndex, for Text Embeddings Inference", "llama-index-embeddings-text-embeddings-inference"
)


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    """OpenAI's client."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as opened:
        yield opened


@client_call(OPENAI, "`embeddings.create(input=[text, ..., image])`", "the client asks for base64 by itself")
def test_openai_embeds_texts_and_images(client: openai.OpenAI, vectors: Floats, image: str) -> None:
    response = client.embeddings.create(model="tiny", input=[*TEXTS, image])
    assert [item.index for item in response.data] == [0, 1, 2, 3]
    close([item.embedding for item in response.data], vectors)
    assert np.linalg.norm(response.data[3].embedding) == pytest.approx(1, abs=1e-5)
    assert response.model == "tiny"
    assert response.usage.total_tokens > 0
    floats = client.embeddings.create(model="tiny", input=[*TEXTS, image], encoding_format="float")
    close([item.embedding for item in floats.data], vectors)
    one = client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=128)
    close([item.embedding for item in one.data], vectors[:1])


@client_call(OPENAI, "`embeddings.create(dimensions=64)`", refused="cannot be shortened")
def test_openai_is_told_that_embeddings_have_one_width(client: openai.OpenAI) -> None:
    client.embeddings.create(model="tiny", input="a", dimensions=64)


@client_call(OPENAI, "`embeddings.create(input=[1, 2, 3])`", "send the text", refused="token ids")
def test_openai_is_told_that_token_ids_need_a_vocabulary(client: openai.OpenAI) -> None:
    client.embeddings.create(model="tiny", input=[1, 2, 3])


@client_call(OPENAI, "`models.list()`, `models.retrieve(id)`")
def test_openai_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


@client_call(
    OPENAI,
    '`moderations.create(input=[image_url, ...], extra_body={"labels": [...]})`',
    'one result for each image; also `model="tiny:shapes"` for a registered label set',
)
def test_openai_scores_labels_of_images(client: openai.OpenAI, image: str) -> None:
    urls = (image, data_uri(shape_png("red circle")))
    pictures: Any = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    found = client.moderations.create(model="tiny", input=pictures, extra_body={"labels": LABELS}).results
    scores: list[Any] = [result.to_dict()["category_scores"] for result in found]
    assert [best_of(one) for one in scores] == ["blue star", "red circle"]
    for result, one in zip(found, scores, strict=True):
        assert set(one) == set(LABELS)
        assert result.flagged == any(score >= 0.5 for score in one.values())
    [registered] = client.moderations.create(model="tiny:shapes", input=image).results
    all_scores: Any = registered.to_dict()["category_scores"]
    assert best_of(all_scores) == "blue star"
    assert len(all_scores) == 64


@client_call(OPENAI, '`post("/classify", body={image, labels})`', "the full answer of `/v1/classify`")
def test_openai_posts_to_classify(client: openai.OpenAI, image: str) -> None:
    found: Any = client.post("/classify", body={"image": image, "labels": LABELS, "top_k": 1}, cast_to=object)
    assert [one["label"] for one in found["data"][0]["labels"]] == ["blue star"]


@client_call(OPENAI, "errors", "`BadRequestError`, `NotFoundError`, `AuthenticationError` and `RateLimitError`")
def test_openai_raises_its_own_errors(client: openai.OpenAI, served: Served, limited: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be shortened") as shortened:
        client.embeddings.create(model="tiny", input="a", dimensions=64)
    assert (shortened.value.code, shortened.value.param) == ("unsupported_dimensions", "dimensions")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="text-embedding-3-small", input="a")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here"):
        client.models.retrieve("gpt-4")
    unknown_key = client.with_options(api_key="sl-wrong")
    with pytest.raises(openai.AuthenticationError, match="this API key is not known"):
        unknown_key.models.list()
    often = client.with_options(base_url=f"{limited.url}/v1", api_key=limited.key)
    with pytest.raises(openai.RateLimitError, match="1 requests a minute") as refused:
        often.embeddings.create(model="tiny", input="a")
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 60


@client_call(
    HUGGING_FACE, "`zero_shot_image_classification(image, candidate_labels=[...])`", "an image is bytes or a path"
)
def test_hugging_face_classifies_an_image(served: Served, tmp_path: Path) -> None:
    client = huggingface_hub.InferenceClient(model=served.url, token=served.key)
    (tmp_path / "star.png").write_bytes(shape_png("blue star"))
    for image in (shape_png("blue star"), str(tmp_path / "star.png")):
        scores = client.zero_shot_image_classification(
            image, candidate_labels=LABELS, hypothesis_template="a photo of a {}"
        )
        assert scores[0].label == "blue star"
        assert {element.label for element in scores} == set(LABELS)
        assert [element.score for element in scores] == sorted((e.score for e in scores), reverse=True)


@client_call(HUGGING_FACE, "`feature_extraction(text)`, `feature_extraction(texts)`")
def test_hugging_face_embeds_texts(served: Served, vectors: Floats) -> None:
    vector = huggingface_hub.InferenceClient(model=served.url, token=served.key).feature_extraction(TEXTS[0])
    assert vector.dtype == np.float32
    close(vector, vectors[:1])
    close(
        huggingface_hub.InferenceClient(base_url=served.url, api_key=served.key).feature_extraction(TEXTS), vectors[:3]
    )


@client_call(COHERE, "`ClientV2.embed(texts=...)`, `embed(images=...)`, `embed(inputs=...)`")
def test_cohere_embeds_images_and_texts(served: Served, vectors: Floats, image: str) -> None:
    with httpx.Client() as http:
        client = cohere.ClientV2(api_key=served.key, base_url=served.url, httpx_client=http)
        texts = client.embed(model="tiny", input_type="search_query", texts=TEXTS, embedding_types=["float"])
        close(texts.embeddings.float_, vectors[:3])
        pictures = client.embed(model="tiny", input_type="image", images=[image], embedding_types=["float"])
        close(pictures.embeddings.float_, vectors[3:])
        inputs: Any = [{"content": [{"type": "image_url", "image_url": {"url": image}}]}]
        mixed = client.embed(model="tiny", input_type="image", inputs=inputs, embedding_types=["float"])
        close(mixed.embeddings.float_, vectors[3:])
        unknown_key = cohere.ClientV2(api_key="no", base_url=served.url, httpx_client=http)
        with pytest.raises(cohere.UnauthorizedError):
            unknown_key.embed(model="tiny", input_type="search_query", texts=["a"], embedding_types=["float"])


@client_call(COHERE, "`Client.embed(texts=...)` (Cohere's first API)", "96 texts in a call, by the client's own choice")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:cohere")  # its use of pydantic
def test_cohere_embeds_texts_by_the_first_api(served: Served, vectors: Floats) -> None:
    with httpx.Client() as http:
        client = cohere.Client(api_key=served.key, base_url=served.url, httpx_client=http)
        found: Any = client.embed(model="tiny", input_type="search_document", texts=TEXTS * 50)
        close(found.embeddings, np.tile(vectors[:3], (50, 1)))
        typed: Any = client.embed(
            model="tiny", input_type="search_document", texts=TEXTS * 50, embedding_types=["float", "int8"]
        )
        close(typed.embeddings.float_, np.tile(vectors[:3], (50, 1)))
        assert np.shape(typed.embeddings.int8) == (150, 128)


@client_call(LANGCHAIN, "`OpenAIEmbeddings(check_embedding_ctx_length=False).embed_documents(texts)`")
def test_langchain_embeds_texts(served: Served, vectors: Floats, image: str) -> None:
    client = OpenAIEmbeddings(
        model="tiny",
        openai_api_base=f"{served.url}/v1",
        openai_api_key=SecretStr(served.key),
        check_embedding_ctx_length=False,
    )
    close(client.embed_documents([*TEXTS, image]), vectors)
    close(client.embed_query(TEXTS[0]), vectors[0])


@client_call(
    LANGCHAIN,
    "`OpenAIEmbeddings().embed_documents(texts)`, which sends token ids",
    "works where `token_vocabulary` is configured",
    refused="this server has no token_vocabulary",
)
def test_langchain_is_told_to_send_texts(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_index.core

    # llama-index-core contains OpenAI's vocabulary under the name of tiktoken's cache, so that nothing is downloaded.
    cache = Path(str(llama_index.core.__file__)).parent / "_static" / "tiktoken_cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    client = OpenAIEmbeddings(
        model="tiny", openai_api_base=f"{served.url}/v1", openai_api_key=SecretStr(served.key), max_retries=0
    )
    client.embed_documents(TEXTS)


@client_call(LLAMA_INDEX, "`OpenAIEmbedding(api_base=...).get_text_embedding(text)`, `get_text_embedding_batch(texts)`")
def test_llama_index_embeds_texts(served: Served, vectors: Floats) -> None:
    """Also texts as long as its default chunks, which are cut to what the model reads."""
    client = OpenAIEmbedding(model_name="tiny", api_base=f"{served.url}/v1", api_key=served.key, max_retries=0)
    close(client.get_text_embedding(TEXTS[0]), vectors[0])
    close(client.get_text_embedding_batch(TEXTS), vectors[:3])
    assert np.shape(client.get_text_embedding_batch(["a long chunk " * 1000])) == (1, 128)


@client_call(LLAMA_INDEX_TEI, "`TextEmbeddingsInference(base_url=..., auth_token=KEY).get_text_embedding_batch(texts)`")
def test_llama_index_embeds_texts_for_text_embeddings_inference(served: Served, vectors: Floats) -> None:
    client = TextEmbeddingsInference(model_name="tiny", base_url=served.url, auth_token=served.key)
    close(client.get_text_embedding_batch(TEXTS), vectors[:3])
    close(client.get_text_embedding(TEXTS[0]), vectors[0])
    assert np.shape(client.get_text_embedding_batch(["a long chunk " * 1000])) == (1, 128)
