"""LangChain's classes for Cohere and for Hugging Face's endpoints."""

from typing import Any

from langchain_cohere import CohereEmbeddings
from langchain_huggingface import HuggingFaceEndpointEmbeddings


def embed_with_cohere(url: str, key: str, texts: list[str]) -> Any:
    """The embeddings of the texts as documents, and of the first as a query."""
    client = CohereEmbeddings(model="tiny", cohere_api_key=key, base_url=url, max_retries=1)
    return [client.embed_documents(texts), client.embed_query(texts[0])]


def embed_with_hugging_face(url: str, key: str, texts: list[str]) -> Any:
    """The embeddings of the texts, if the client takes a URL."""
    client = HuggingFaceEndpointEmbeddings(model=url, huggingfacehub_api_token=key)
    return client.embed_documents(texts)
