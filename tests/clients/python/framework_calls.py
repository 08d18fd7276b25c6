"""Frameworks that send texts to an OpenAI-compatible server."""

import asyncio
from typing import Any

from haystack import Document
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.utils import Secret
from mem0.configs.embeddings.base import BaseEmbedderConfig
from mem0.embeddings.openai import OpenAIEmbedding
from pydantic_ai import Embedder
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.providers.openai import OpenAIProvider


def embed_with_haystack(url: str, key: str, texts: list[str]) -> Any:
    """The embeddings of the texts as documents, and of the first as a query."""
    options: dict[str, Any] = {"api_key": Secret.from_token(key), "model": "tiny", "api_base_url": f"{url}/v1"}
    documents = OpenAIDocumentEmbedder(progress_bar=False, raise_on_failure=True, **options)
    found = documents.run([Document(content=text) for text in texts])["documents"]
    return [[document.embedding for document in found], OpenAITextEmbedder(**options).run(texts[0])["embedding"]]


def embed_with_mem0(url: str, key: str, texts: list[str], dimensions: int | None = None) -> Any:
    """The embeddings of the texts together, and of the first alone."""
    config = BaseEmbedderConfig(model="tiny", api_key=key, openai_base_url=f"{url}/v1", embedding_dims=dimensions)
    client = OpenAIEmbedding(config)
    return [client.embed_batch(texts), client.embed(texts[0])]


def embed_with_pydantic_ai(url: str, key: str, texts: list[str]) -> Any:
    """The embeddings of the texts as documents, and of the first as a query."""
    model = OpenAIEmbeddingModel("tiny", provider=OpenAIProvider(base_url=f"{url}/v1", api_key=key))

    async def embed() -> Any:
        embedder = Embedder(model)
        documents = await embedder.embed_documents(texts)
        query = await embedder.embed_query(texts[0])
        return [[list(vector) for vector in documents.embeddings], list(query.embeddings[0])]

    return asyncio.run(embed())
