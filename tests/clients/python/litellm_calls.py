"""LiteLLM's library, with what a user changes: the model's prefix, the address and the key."""

from typing import Any

import litellm


def embed(model: str, url: str, key: str, inputs: list[str], **options: Any) -> Any:
    """Embed with the provider that `model` starts with."""
    response = litellm.embedding(model=model, input=inputs, api_base=url, api_key=key, num_retries=0, **options)
    return {"vectors": [item["embedding"] for item in response.data], "usage": response.usage.model_dump()}
