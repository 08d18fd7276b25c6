"""Texts out of OpenAI's token ids, which some clients send instead of them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from storage.settings import ConfigError


class TokenVocabulary:
    """What OpenAI's token ids stand for, from a file in tiktoken's format: lines of base64 and a number.

    LangChain's `OpenAIEmbeddings` sends ids of `cl100k_base` for every model that it does not know. The file is
    OpenAI's; whoever has tiktoken has it in its cache, and llama-index-core brings it along. Ids that mark something
    else than text are not in it.

    Raises `storage.settings.ConfigError` for a file that is none.
    """

    def __init__(self, path: Path) -> None:
        try:
            lines = [line.split() for line in path.read_bytes().splitlines() if line]
            self._words = {int(number): base64.b64decode(word, validate=True) for word, number in lines}
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not lines of base64 and a number, as tiktoken has them"
            raise ConfigError(f"token_vocabulary: {path}: {reason}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text. A character that the ids end within is left out. Raises `KeyError` for an unknown id."""
        return b"".join(self._words[number] for number in ids).decode(errors="ignore")
