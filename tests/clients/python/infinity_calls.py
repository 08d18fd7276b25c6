"""The client that infinity ships."""

from typing import Any

from infinity_client import AuthenticatedClient
from infinity_client.api.default import embeddings
from infinity_client.models import OpenAIEmbeddingInputImage, OpenAIEmbeddingInputText
from infinity_client.vision_client import InfinityVisionAPI


def embed(url: str, key: str, kind: str, inputs: list[str]) -> Any:
    """Embed texts (`kind` is `text`) or images (`image`)."""
    body_type = {"text": OpenAIEmbeddingInputText, "image": OpenAIEmbeddingInputImage}[kind]
    with AuthenticatedClient(base_url=url, token=key, raise_on_unexpected_status=True) as client:
        response = embeddings.sync(client=client, body=body_type(input_=inputs, model="tiny"))
    return [item.embedding for item in response.data]


def embed_with_vision(url: str, texts: list[str]) -> Any:
    """Embed texts with the client that sends no key."""
    future = InfinityVisionAPI(url=url, model="tiny").embed("tiny", texts)
    return [vector.tolist() for vector in future.result()[0]]
