"""What a family of checkpoints says about its texts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol


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
