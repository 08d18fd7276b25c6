"""The family SigLIP 2, fixed resolution: `google/siglip2-*`. Gemma's tokenizer; lower-case texts with punctuation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

NAME = "siglip2"
FILES = ("tokenizer.json",)
CLASSES = ("GemmaTokenizer", "Siglip2Tokenizer")


def recognizes(tokenizer: Mapping[str, Any], files: Collection[str]) -> bool:
    """Whether it names Gemma's tokenizer, or SigLIP 2's, which is the same."""
    named = str(tokenizer.get("tokenizer_class") or "")
    return named.removesuffix("Fast") in CLASSES and "tokenizer.json" in files


def canonicalize(text: str) -> str:
    """Lower-case the text. `_` and sequences of spaces become one space. Punctuation stays: `C++` is not `C#`.

    SigLIP 2 was trained on lower-cased texts (Tschannen et al. 2025, section 2). The rule for the underscore is
    Sightline's own, because `golden_retriever` in a label means two words.
    """
    return " ".join(text.replace("_", " ").lower().split())


def load_tokenizer(directory: Path) -> Any:
    """Load transformers' `GemmaTokenizer`."""
    from transformers import GemmaTokenizer

    return GemmaTokenizer.from_pretrained(directory, local_files_only=True)
