"""Families of SigLIP checkpoints, which differ in how they prepare texts. A new family is one file and one entry in
`FAMILIES`.

A checkpoint's family is recognised by its files, never by its name. Towers, preprocessing and scoring are the same for
all families, and are configured by the checkpoint's own settings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from siglip.families import siglip, siglip2
from siglip.families.text_rules import RULES, choose_family


class Family(Protocol):
    """The text rules of a family: a module of this package."""

    NAME: str
    FILES: tuple[str, ...]
    """The files from which its tokenizer is loaded."""
    CLASSES: tuple[str, ...]
    """Names of its tokenizer in transformers that a `tokenizer_config.json` may have, without the suffix `Fast`."""

    def recognizes(self, tokenizer: Mapping[str, Any], files: Collection[str]) -> bool:
        """Whether a checkpoint with this `tokenizer_config.json` and these files belongs to the family."""

    def canonicalize(self, text: str) -> str:
        """The text in the form that the family's tokenizer gets. Empty when no character remains."""

    def load_tokenizer(self, directory: Path) -> Any:
        """Load transformers' tokenizer of a checkpoint. Raises `OSError` or `ValueError` when its files are broken."""


FAMILIES: dict[str, Family] = {
    family.NAME: family
    for own in (siglip, siglip2)
    for family in (choose_family(own, rule) for rule in ("auto", *RULES))
}
"""The supported families, and those with a text rule that is not their own, by name."""


def recognize_family(tokenizer: Mapping[str, Any], files: Collection[str]) -> Family | None:
    """The family of a checkpoint with this `tokenizer_config.json` and these files, or None."""
    return next((family for family in FAMILIES.values() if family.recognizes(tokenizer, files)), None)
