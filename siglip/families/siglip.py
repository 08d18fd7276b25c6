"""SigLIP: `google/siglip-*`, the multilingual ones included. A SentencePiece tokenizer, texts without punctuation."""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

NAME = "siglip"
FILES = ("spiece.model",)
CLASSES = ("SiglipTokenizer",)

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def recognizes(tokenizer: Mapping[str, Any], files: Collection[str]) -> bool:
    """It names `SiglipTokenizer`, or names none and has a SentencePiece model."""
    named = str(tokenizer.get("tokenizer_class") or "")
    return (named.removesuffix("Fast") in CLASSES or not named) and "spiece.model" in files


def canonicalize(text: str) -> str:
    """Lower-case text without ASCII punctuation; `_` and runs of space become one space.

    The rule of big_vision's zero-shot evaluator (`canonicalize_text`), with which SigLIP's published zero-shot figures
    were taken; its training saw texts only lower-cased. transformers would delete `_` and read `golden_retriever` as
    one word. Lower-casing comes last, as it does there: what stands at a word's end decides the form of a final capital
    sigma. Text in a script without case or ASCII punctuation passes unchanged.
    """
    return " ".join(text.replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


def load_tokenizer(directory: Path) -> Any:
    """transformers' `SiglipTokenizer`."""
    from transformers import SiglipTokenizer

    return SiglipTokenizer.from_pretrained(directory, local_files_only=True)
