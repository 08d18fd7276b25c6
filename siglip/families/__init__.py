"""What differs between families of SigLIP checkpoints: their texts. A new family is one file here, and its name in
`FAMILIES`.

A family is recognized by what a checkpoint says of itself, never by its name. Towers, preprocessing and scoring are the
same for all, and read from the checkpoint's own settings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from siglip.families import siglip, siglip2


class Family(Protocol):
    """The text rules of a family: a module of this package."""

    NAME: str
    FILES: tuple[str, ...]
    """What its tokenizer is loaded from."""
    CLASSES: tuple[str, ...]
    """Its tokenizer's classes in transformers, as a `tokenizer_config.json` may name them; also with `Fast` behind."""

    def recognizes(self, tokenizer: Mapping[str, Any], files: Collection[str]) -> bool:
        """Whether a checkpoint with this `tokenizer_config.json` and these files is of the family."""

    def canonicalize(self, text: str) -> str:
        """The text as the family's tokenizer is to see it; empty when nothing of it is left."""

    def load_tokenizer(self, directory: Path) -> Any:
        """transformers' tokenizer of a checkpoint. Raises `OSError` or `ValueError` when its files are no good."""


FAMILIES: dict[str, Family] = {family.NAME: family for family in (siglip, siglip2)}
"""The families that are supported, by name."""


def recognize_family(tokenizer: Mapping[str, Any], files: Collection[str]) -> Family | None:
    """The family of a checkpoint with this `tokenizer_config.json` and these files, or None."""
    return next((family for family in FAMILIES.values() if family.recognizes(tokenizer, files)), None)
