"""The family SigLIP: `google/siglip-*`, also multilingual. SentencePiece tokenizer; texts without punctuation."""

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
    """Whether it has a SentencePiece model and names `SiglipTokenizer` or no tokenizer."""
    named = str(tokenizer.get("tokenizer_class") or "")
    return (named.removesuffix("Fast") in CLASSES or not named) and "spiece.model" in files


def canonicalize(text: str) -> str:
    """Lower-case the text and remove ASCII punctuation. `_` and sequences of spaces become one space.

    This is the rule of big_vision's zero-shot evaluator (`canonicalize_text`), which produced SigLIP's published
    zero-shot figures. In training, texts were only lower-cased. transformers would delete `_` and read
    `golden_retriever` as one word. As in big_vision, lower-casing is the last step, because the lower-case form of a
    capital sigma depends on whether it ends a word. Text in a script without case or ASCII punctuation is unchanged.
    """
    return " ".join(text.replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


def load_tokenizer(directory: Path) -> Any:
    """Load transformers' `SiglipTokenizer`."""
    from transformers import SiglipTokenizer

    tokenizer = SiglipTokenizer.from_pretrained(directory, local_files_only=True)
    if tokenizer.sp_model_kwargs.get("enable_sampling"):
        raise ValueError("tokenizer_config.json: sp_model_kwargs: enable_sampling gives a text other tokens each time")
    return tokenizer
