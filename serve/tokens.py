"""Decoding of OpenAI's token ids, which some clients send instead of texts."""

from __future__ import annotations

import base64
from codecs import getincrementaldecoder
from collections.abc import Sequence
from pathlib import Path

from storage.settings import ConfigError


class TokenVocabulary:
    """Vocabulary that decodes OpenAI's token ids, read from a file in tiktoken's format: lines of base64 and a number.

    LangChain's `OpenAIEmbeddings` sends token ids of `cl100k_base` for every model that it does not know. The file
    belongs to OpenAI; tiktoken downloads it into its cache, and llama-index-core contains a copy. The file has no
    special tokens, that is, ids that stand for no text.

    Raises `storage.settings.ConfigError` for a file that cannot be read or has another format.
    """

    def __init__(self, path: Path) -> None:
        try:
            lines = [line.split() for line in path.read_bytes().splitlines() if line]
            self._words = {int(number): base64.b64decode(word, validate=True) for word, number in lines}
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not lines of base64 and a number, as tiktoken has them"
            raise ConfigError(f"token_vocabulary: {path}: {reason}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. Incomplete UTF-8 characters at the start and at the end are dropped.

        Clients cut long texts between tokens, and a token may end within a character. Raises `KeyError` for an unknown
        id, and `ValueError` for ids that make no text.
        """
        text = b"".join(self._words[number] for number in ids)
        start = 0
        while start < min(3, len(text)) and 0x80 <= text[start] < 0xC0:
            start += 1
        return getincrementaldecoder("utf-8")().decode(text[start:])
