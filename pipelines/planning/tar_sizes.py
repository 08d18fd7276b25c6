"""Sizes of tars: bytes for each image, learned from the first few tars of a folder, to estimate the others' images."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from pipelines.inputs.rows import Input

_TARS_SAMPLED = 16
"""Tars of a folder that are inspected before the others' images are estimated from their size."""


class TarSizes:
    """Bytes per image in the tars of each folder, learned from the first few tars and used to estimate the others."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, bool], list[float]] = {}

    def note(self, tar: Input) -> None:
        """Add a tar that was inspected."""
        if tar.kind == "tar":
            self._seen.setdefault(self._group(tar), []).append(tar.size / tar.rows)

    def estimate(self, tar: Input) -> Input | None:
        """Return the tar with estimated rows, or None if too few similar tars were inspected.

        Similar tars are in the same folder, and compressed or uncompressed like this one.
        """
        seen = self._seen.get(self._group(tar), []) if tar.kind == "tar" else []
        if len(seen) < _TARS_SAMPLED:
            return None
        return replace(tar, rows=max(1, round(tar.size / median(seen))))

    def _group(self, tar: Input) -> tuple[str, bool]:
        return tar.uri.rpartition("/")[0], tar.uri.lower().endswith("gz")
