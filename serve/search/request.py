"""A search as a route asks for it, without the names of `curation`, which only a configured search imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SearchQuery:
    """A checked search: `curation.search.query.Query`, whose example image is a string, and what the answer has."""

    texts: tuple[str, ...]
    without: tuple[str, ...]
    image: str | None
    like: str | None
    labels: tuple[str, ...]
    top: int
    cutoff: Literal["auto", "none"]
    fold: bool
    thumbnails: bool
