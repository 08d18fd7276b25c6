"""Python clients that are installed into environments of their own: LiteLLM, and frameworks."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from siglip.scoring import Floats
from tests.clients.conftest import TEXTS, Served, close
from tests.support.clients.calls import Client, client_call
from tests.support.clients.worker import ClientError, ClientProcess, install_environment, make_environment
from tests.support.ports import free_port

LITELLM = Client("LiteLLM", "litellm", "litellm")
PROXY = Client("LiteLLM's proxy", "litellm", "litellm")
LANGCHAIN_COHERE = Client("LangChain, for Cohere (Python)", "langchain-cohere", "frameworks")
LANGCHAIN_HUGGING_FACE = Client("LangChain, for Hugging Face (Python)", "langchain-huggingface", "frameworks")
HAYSTACK = Client("Haystack", "haystack-ai", "frameworks")
MEM0 = Client("Mem0", "mem0ai", "frameworks")
PYDANTIC_AI = Client("Pydantic AI", "pydantic-ai-slim", "frameworks")
INFINITY = Client("infinity's client", "infinity-client", "frameworks")

pytestmark = pytest.mark.slow


def check_documents_and_query(found: Any, vectors: Floats) -> None:
    """Check the embeddings of `TEXTS`, and of the first of them."""
    documents, query = found
    close(documents, vectors[:3])
    close(query, vectors[0])


@client_call(LITELLM, '`embedding(model="openai/tiny", api_base="http://HOST:8000/v1")`', "also `hosted_vllm/tiny`")
@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_embeds_texts_and_images(
    litellm: ClientProcess, served: Served, vectors: Floats, image: str, provider: str
) -> None:
    inputs = [*TEXTS, image]
    model, url = f"{provider}/tiny", f"{served.url}/v1"
    found = litellm.call("litellm_calls", "embed", model=model, url=url, key=served.key, inputs=inputs)
    close(found["vectors"], vectors)
    assert found["usage"]["prompt_tokens"] > 0


@client_call(LITELLM, '`embedding(model="infinity/tiny", api_base="http://HOST:8000")`')
def test_litellm_embeds_for_infinity(litellm: ClientProcess, served: Served, vectors: Floats) -> None:
    options = {"url": served.url, "key": served.key, "inputs": TEXTS}
    close(litellm.call("litellm_calls", "embed", model="infinity/tiny", **options)["vectors"], vectors[:3])


@client_call(LITELLM, '`embedding(model="cohere/tiny", api_base="http://HOST:8000/v2/embed")`')
def test_litellm_embeds_for_cohere(litellm: ClientProcess, served: Served, vectors: Floats) -> None:
    options = {"url": f"{served.url}/v2/embed", "key": served.key, "inputs": TEXTS}
    close(litellm.call("litellm_calls", "embed", model="cohere/tiny", **options)["vectors"], vectors[:3])


@client_call(LITELLM, "errors", "`AuthenticationError`, `NotFoundError`, `BadRequestError`")
def test_litellm_raises_its_own_errors(litellm: ClientProcess, served: Served) -> None:
    def fail(model: str = "openai/tiny", key: str = served.key, **options: Any) -> ClientError:
        request = {"model": model, "url": f"{served.url}/v1", "key": key, "inputs": ["a"], **options}
        with pytest.raises(ClientError) as raised:
            litellm.call("litellm_calls", "embed", **request)
        return raised.value

    assert fail(key="sl-wrong").type == "AuthenticationError"
    assert fail("openai/other").type == "NotFoundError"
    wide = fail(dimensions=64, allowed_openai_params=["dimensions"])
    assert wide.type == "BadRequestError"
    assert "cannot be shortened" in str(wide)


@contextmanager
def run_proxy(cache: Path, folder: Path, served: Served) -> Iterator[str]:
    """LiteLLM's proxy in front of an endpoint, until the block ends. Yields its URL. Its key is `sk-proxy`."""
    parameters = {"model": "openai/tiny", "api_base": f"{served.url}/v1", "api_key": served.key}
    config = {
        "model_list": [{"model_name": "siglip", "litellm_params": parameters}],
        "general_settings": {"master_key": "sk-proxy"},
        "litellm_settings": {"telemetry": False, "num_retries": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    programs = install_environment(cache, "litellm")
    command = [str(programs / "python"), str(programs / "litellm"), "--config", "config.yaml"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=make_environment(), stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as client:  # 0.5, 1, ... 64 s between them
            try:
                client.get(f"{url}/health/readiness", timeout=120).raise_for_status()
            except httpx.HTTPError:
                pytest.fail((folder / "log").read_text()[-3000:])
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def proxy(
    litellm: ClientProcess, cache: Path, served: Served, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    """OpenAI's client of LiteLLM's proxy. `litellm` has its environment."""
    with (
        run_proxy(cache, tmp_path_factory.mktemp("proxy"), served) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="sk-proxy", max_retries=0) as client,
    ):
        yield client


@client_call(PROXY, "`model: openai/tiny`, called by OpenAI's client", "texts and images, as floats and as base64")
def test_the_proxy_of_litellm_embeds(proxy: openai.OpenAI, vectors: Floats, image: str) -> None:
    close([item.embedding for item in proxy.embeddings.create(model="siglip", input=[*TEXTS, image]).data], vectors)
    floats = proxy.embeddings.create(model="siglip", input=[*TEXTS, image], encoding_format="float")
    close([item.embedding for item in floats.data], vectors)
    close([item.embedding for item in proxy.embeddings.create(model="siglip", input=TEXTS[0]).data], vectors[:1])


@client_call(PROXY, "called by OpenAI's client for Node, whose default is base64")
def test_the_proxy_of_litellm_embeds_for_node(
    proxy: openai.OpenAI, node: ClientProcess, vectors: Floats, image: str
) -> None:
    url = str(proxy.base_url).removesuffix("/v1/")
    request = {"model": "siglip", "input": [*TEXTS, image]}
    close(node.call("openai", "embed", url=url, key="sk-proxy", request=request)["vectors"], vectors)


@client_call(PROXY, "`dimensions=64`", refused="cannot be shortened")
def test_the_proxy_of_litellm_passes_a_refusal_on(proxy: openai.OpenAI) -> None:
    allowed = {"allowed_openai_params": ["dimensions"]}
    proxy.embeddings.create(model="siglip", input="a", dimensions=64, extra_body=allowed)


@client_call(LANGCHAIN_COHERE, "`CohereEmbeddings(base_url=...).embed_documents(texts)`, `embed_query(text)`")
def test_langchain_embeds_texts_for_cohere(frameworks: ClientProcess, served: Served, vectors: Floats) -> None:
    options = {"url": served.url, "key": served.key, "texts": TEXTS}
    check_documents_and_query(frameworks.call("langchain_calls", "embed_with_cohere", **options), vectors)


@client_call(
    LANGCHAIN_HUGGING_FACE,
    "`HuggingFaceEndpointEmbeddings(model=URL)`",
    "the client itself takes no URL; use LangChain's `OpenAIEmbeddings`",
    refused="must be a HuggingFace repo ID, not a URL",
)
def test_langchain_takes_no_url_for_hugging_face(frameworks: ClientProcess, served: Served) -> None:
    options = {"url": served.url, "key": served.key, "texts": TEXTS}
    frameworks.call("langchain_calls", "embed_with_hugging_face", **options)


@client_call(HAYSTACK, "`OpenAITextEmbedder(api_base_url=...)`, `OpenAIDocumentEmbedder`")
def test_haystack_embeds_texts(frameworks: ClientProcess, served: Served, vectors: Floats) -> None:
    options = {"url": served.url, "key": served.key, "texts": TEXTS}
    check_documents_and_query(frameworks.call("framework_calls", "embed_with_haystack", **options), vectors)


@client_call(MEM0, "`OpenAIEmbedding` with `openai_base_url`", "`embedding_dims` is left out, or the model's width")
@pytest.mark.parametrize("dimensions", [None, 128])
def test_mem0_embeds_texts(frameworks: ClientProcess, served: Served, vectors: Floats, dimensions: int | None) -> None:
    options = {"url": served.url, "key": served.key, "texts": TEXTS, "dimensions": dimensions}
    check_documents_and_query(frameworks.call("framework_calls", "embed_with_mem0", **options), vectors)


@client_call(MEM0, "`embedding_dims=1536`", refused="this model's embeddings have 128 dimensions")
def test_mem0_is_told_the_width(frameworks: ClientProcess, served: Served) -> None:
    options = {"url": served.url, "key": served.key, "texts": TEXTS, "dimensions": 1536}
    frameworks.call("framework_calls", "embed_with_mem0", **options)


@client_call(PYDANTIC_AI, "`Embedder(OpenAIEmbeddingModel(...)).embed_documents(texts)`, `embed_query(text)`")
def test_pydantic_ai_embeds_texts(frameworks: ClientProcess, served: Served, vectors: Floats) -> None:
    options = {"url": served.url, "key": served.key, "texts": TEXTS}
    check_documents_and_query(frameworks.call("framework_calls", "embed_with_pydantic_ai", **options), vectors)


@client_call(INFINITY, "`embeddings.sync` of texts and of images")
def test_the_client_of_infinity_embeds(frameworks: ClientProcess, served: Served, vectors: Floats, image: str) -> None:
    """It sends `dimensions: 0`, its default."""
    options = {"url": served.url, "key": served.key}
    close(frameworks.call("infinity_calls", "embed", **options, kind="text", inputs=TEXTS), vectors[:3])
    close(frameworks.call("infinity_calls", "embed", **options, kind="image", inputs=[image]), vectors[3:])


@client_call(INFINITY, "`InfinityVisionAPI`, which sends no key", "needs an endpoint without keys", refused="401")
def test_the_vision_client_of_infinity_sends_no_key(frameworks: ClientProcess, served: Served) -> None:
    frameworks.call("infinity_calls", "embed_with_vision", url=served.url, texts=TEXTS)
