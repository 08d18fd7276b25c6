"""SigLIP 2 at a fixed resolution: `google/siglip2-*`. Gemma's tokenizer, lower-case texts with their punctuation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

NAME = "siglip2"
FILES = ("tokenizer.json",)
CLASSES = ("GemmaTokenizer", "Siglip2Tokenizer")


def recognizes(tokenizer: Mapping[str, Any], files: Collection[str]) -> bool:
    """It names Gemma's tokenizer, by itself or as SigLIP 2's."""
    named = str(tokenizer.get("tokenizer_class") or "")
    return named.removesuffix("Fast") in CLASSES and "tokenizer.json" in files


def canonicalize(text: str) -> str:
    """Lower-case text, `_` and runs of space as one space. Punctuation stays: `C++` and `C#` are different texts.

    SigLIP 2 was trained on lower-cased texts (Tschannen et al. 2025, section 2). The underscore is ours: in a label,
    `golden_retriever` means two words.
    """
    return " ".join(text.replace("_", " ").lower().split())


def load_tokenizer(directory: Path) -> Any:
    """transformers' `GemmaTokenizer`."""
    from transformers import GemmaTokenizer

    return GemmaTokenizer.from_pretrained(directory, local_files_only=True)
