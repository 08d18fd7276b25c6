"""Whether answers may judge a threshold: those that chose it cannot, because the figures would be too good.

A label set remembers, for each label whose threshold was chosen, a fingerprint of the answers that chose it: the
smallest hashes of the answered images (a bottom-k sketch; Cohen and Kaplan 2007). It recognizes the answers in any file
that has at least half of these images, also if answers were added or taken away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from curation.quality.truth import Truth
from siglip.labels import LabelSet

_HASHES, _DIGITS = 8, 8


def make_fingerprint(images: Iterable[str]) -> str:
    """The fingerprint of answers about images with these ids: up to eight hashes of eight hexadecimal digits."""
    return "".join(sorted({_hash(image) for image in images})[:_HASHES])


def separate(labels: LabelSet, truth: Truth) -> tuple[Truth, set[int]]:
    """Leave out the answers that chose a label's threshold, if others about this label remain.

    Returns the truth without them, and the labels, by index, for which only such answers are there. Their figures are
    not independent of the threshold.
    """
    chosen = {row: label.chosen_by for row, label in enumerate(labels.names) if label.chosen_by}
    source = truth.source if truth.source is not None else np.zeros(len(truth.image), np.int64)
    answered: dict[int, dict[int, set[str]]] = {row: {} for row in chosen}
    hashes = [_hash(image) for image in truth.ids]
    for image, row, one in zip(truth.image.tolist(), truth.label.tolist(), source.tolist(), strict=True):
        if row in answered:
            answered[row].setdefault(one, set()).add(hashes[image])
    kept, dependent = np.ones(len(truth.image), bool), set()
    for row, sources in answered.items():
        mine = {one for one, images in sources.items() if _contains(images, chosen[row] or "")}
        if mine and len(mine) == len(sources):
            dependent.add(row)
        elif mine:
            kept &= (truth.label != row) | ~np.isin(source, list(mine))
    if kept.all():
        return truth, dependent
    columns = {name: getattr(truth, name)[kept] for name in ("image", "label", "right", "weight")}
    return replace(truth, **columns, source=source[kept], complete=False, exclusive=False), dependent


def _contains(images: set[str], fingerprint: str) -> bool:
    known = [fingerprint[start : start + _DIGITS] for start in range(0, len(fingerprint), _DIGITS)]
    return 2 * sum(one in images for one in known) >= len(known)


def _hash(image: str) -> str:
    return hashlib.sha256(image.encode()).hexdigest()[:_DIGITS]
