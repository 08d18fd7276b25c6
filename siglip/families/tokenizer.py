"""A checkpoint's tokenizer: token ids of texts, and what of a text the model reads. Does not import torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from siglip.checkpoint import PinnedModel, quiet_transformers
from siglip.checkpoints.files import CheckpointError
from siglip.families import Family
from siglip.label_text.tokens import LabelReadings, Reading
from siglip.labels import LabelSet

CHARACTERS_PER_TOKEN = 16
"""Characters of a long text that are tokenized at first, for each token of the model's input: words have far fewer."""
_DIGEST_BYTES = 16


class Tokenizer:
    """The tokenizer of a checkpoint's files in `directory`, with the text rule of its family.

    `length` is the number of tokens of the model's input. It may be called by one thread only. Raises what the
    tokenizer's library raises for bad files, which may be any exception.
    """

    def __init__(self, directory: Path, family: Family, length: int) -> None:
        self._family = family
        self._length = length
        self._tokenizer = family.load_tokenizer(directory)
        special = set(self._tokenizer.all_special_ids)
        unknown = self._tokenizer.unk_token_id
        padding = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        self._unknown = None if unknown is None or unknown in padding else int(unknown)
        # SentencePiece's space, which stands alone before a character that is no piece.
        special.add(self._tokenizer.convert_tokens_to_ids("\N{LOWER ONE EIGHTH BLOCK}"))
        self._blank = np.asarray(sorted(one for one in special if one is not None and one != self._unknown), np.int64)

    @property
    def size(self) -> int:
        """Number of tokens in the vocabulary, without those that were added to it, which few texts have."""
        return int(self._tokenizer.vocab_size)

    def read(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], list[Reading]]:
        """Token ids of texts in their canonical form, int64 (N, length), and what the model reads of each text."""
        ids, counts = self.encode(texts)
        unknown = np.zeros(len(ids), np.int64) if self._unknown is None else (ids == self._unknown).sum(axis=1)
        known = (~np.isin(ids, self._blank)).sum(axis=1) - unknown
        digests = [hashlib.blake2b(row.tobytes(), digest_size=_DIGEST_BYTES).digest() for row in ids]
        return ids, list(map(Reading, counts.tolist(), known.tolist(), unknown.tolist(), digests))

    def read_labels(self, labels: LabelSet) -> tuple[NDArray[np.int64], LabelReadings]:
        """Token ids of a label set's prompts, one after another, int64 (N, length), and what the model reads of them.

        Refuses nothing: see `LabelReadings.check`.
        """
        ids, readings = self.read([prompt for group in labels.prompts(self._family) for prompt in group])
        found = LabelReadings(labels, self._family, readings)
        if doubtful := found.list_doubtful():
            found.add_names(self.read(doubtful)[1])
        return ids, found

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids of texts in their canonical form, int64 (N, length), and the numbers of tokens, int64 (N,).

        Tokens beyond `length` are cut off. A number includes the end token. It is exact up to `length`; a larger one
        only says that tokens were cut.

        The time for a text does not depend on the length of what is cut off: only its first words are tokenized, and
        all of it if those have too few tokens. The ids are the same, because both families' vocabularies have no token
        that goes on after a space. Only within a first word that is longer than that may a token end elsewhere.
        """
        whole = [self._family.canonicalize(text) for text in texts]
        first = [_first_words(text, CHARACTERS_PER_TOKEN * self._length) for text in whole]
        ids, counts = self._encode(first)
        short = [row for row, text in enumerate(whole) if len(first[row]) < len(text) and counts[row] <= self._length]
        if short:
            ids[short], counts[short] = self._encode([whole[row] for row in short])
        return ids, counts

    def _encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids of canonical texts, and their numbers of tokens before the cut.

        Always padded to the full length and without an attention mask: SigLIP was trained so, and its embedding is the
        last position's. Shorter padding gives wrong scores without an error.
        """
        if not texts:
            return np.zeros((0, self._length), np.int64), np.zeros(0, np.int64)
        encoded = self._tokenizer(
            list(texts),
            padding="max_length",
            max_length=self._length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="np",
        )
        counts = np.asarray(encoded["attention_mask"], dtype=np.int64).sum(axis=1)
        full = np.flatnonzero(counts == self._length).tolist()
        if full:
            counts[full] = self._count([texts[row] for row in full])
        return np.asarray(encoded["input_ids"], dtype=np.int64), counts

    def count(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Exact number of tokens of each text in its canonical form, int64 (N,), with the end token."""
        return self._count([self._family.canonicalize(text) for text in texts])

    def _count(self, texts: Sequence[str]) -> NDArray[np.int64]:
        ids = self._tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return np.asarray([len(one) for one in ids], dtype=np.int64)


def load_tokenizer(pinned: PinnedModel, directory: Path | None = None) -> Tokenizer:
    """Load a checkpoint's tokenizer: from `directory`, or from its files here, which are downloaded if necessary.

    Raises `CheckpointError`.
    """
    quiet_transformers()
    try:
        return Tokenizer(directory or pinned.fetch(weights=False), pinned.rule, pinned.text_length)
    except CheckpointError:
        raise
    except Exception as error:  # each tokenizer library raises its own types for bad files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"model.source: {pinned.config.source}: its tokenizer: {reason}") from error


def _first_words(text: str, size: int) -> str:
    """The words in the first `size` characters of a text; a part of the first word if that is longer."""
    if len(text) <= size:
        return text
    end = text.rfind(" ", 0, size + 1)
    return text[: end if end > 0 else size]
