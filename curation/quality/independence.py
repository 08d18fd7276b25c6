"""Whether answers may judge a label: those that chose its threshold or trained its probe make figures too good.

A label set remembers, for each label, a fingerprint of the answers that chose its threshold, and of those that trained
its probe. These may not choose a threshold either: a probe fits them better than other images. A fingerprint has an
item for each sample or file of answers. A sample is known by its id. A file of other answers is known by the smallest
hashes of the answered images (a bottom-k sketch; Cohen and Kaplan 2007): this recognizes the answers in any file that
has at least half of these images, also if answers were added or taken away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from curation.quality.truth import Truth
from siglip.labels import LabelSet

_HASHES, _DIGITS = 8, 8
_SAMPLE, _SEPARATOR = "sample:", " "


def make_fingerprint(truth: Truth, row: int) -> str:
    """The fingerprint of the answers about the label with index `row`: an item for each source, separated by spaces.

    An item is the id of a sample, or up to eight hashes of eight hexadecimal digits.
    """
    items = []
    for source, images in _group_by_source(truth, row).items():
        sample = _name_sample(truth, source)
        items.append(f"{_SAMPLE}{sample}" if sample else _sketch(images))
    return _SEPARATOR.join(sorted(items))


def separate(labels: LabelSet, truth: Truth, *, training_only: bool = False) -> tuple[Truth, set[int]]:
    """Leave out the answers that chose a label's threshold or trained its probe, if others about this label remain.

    With `training_only`, only answers that trained a probe are left out. Returns the truth without them, and the
    labels, by index, for which only such answers are there: their figures are not independent. A sample whose answers
    about a label are left out does not divide this label's images into strata.
    """
    kept, kept_unsure, dependent = np.ones(len(truth.image), bool), np.ones(len(truth.unsure_image), bool), set()
    designs = {design.sample: design for design in truth.designs}
    for row, label in enumerate(labels.names):
        chosen = "" if training_only else label.chosen_by or ""
        items = [*chosen.split(), *(label.trained_by or "").split()]
        if not items:
            continue
        sources = _group_by_source(truth, row)
        mine = {source for source, images in sources.items() if _chose(items, _name_sample(truth, source), images)}
        if mine and len(mine) == len(sources):
            dependent.add(row)
        elif mine:
            fresh = ~sum(1 << source for source in mine)
            kept &= (truth.label != row) | (truth.sources() & fresh != 0)
            kept_unsure &= (truth.unsure_label != row) | (truth.unsure_sources() & fresh != 0)
            for sample in {_name_sample(truth, source) for source in mine} & designs.keys():
                edges = {name: edge for name, edge in designs[sample].edges.items() if name != label.name}
                designs[sample] = replace(designs[sample], edges=edges)
    if kept.all() and kept_unsure.all():
        return truth, dependent
    notice = (
        f"{int((~kept).sum()):,} answers chose the thresholds of their labels and are left out: there are others about "
        "these labels"
    )
    return (
        replace(
            truth,
            **{name: getattr(truth, name)[kept] for name in ("image", "label", "right", "weight")},
            source=truth.sources()[kept],
            unsure_image=truth.unsure_image[kept_unsure],
            unsure_label=truth.unsure_label[kept_unsure],
            unsure_source=truth.unsure_sources()[kept_unsure],
            designs=tuple(designs.values()),
            notices=(*truth.notices, notice),
            complete=False,
            exclusive=False,
        ),
        dependent,
    )


def _group_by_source(truth: Truth, row: int) -> dict[int, set[str]]:
    """The ids of the images that each source answers about, for one label, without those that it is unsure about."""
    found: dict[int, set[str]] = {}
    mine = truth.label == row
    for image, sources in zip(truth.image[mine].tolist(), truth.sources()[mine].tolist(), strict=True):
        for source in range(sources.bit_length()):
            if sources >> source & 1:
                found.setdefault(source, set()).add(truth.ids[image])
    return found


def _name_sample(truth: Truth, source: int) -> str:
    return truth.samples[source] if source < len(truth.samples) else ""


def _chose(items: list[str], sample: str, images: set[str]) -> bool:
    """Whether the answers of a source are among those that a fingerprint's items are about."""
    if sample and f"{_SAMPLE}{sample}" in items:
        return True
    hashes = {_hash(image) for image in images}
    return any(_contains(hashes, item) for item in items if not item.startswith(_SAMPLE))


def _sketch(images: Iterable[str]) -> str:
    return "".join(sorted({_hash(image) for image in images})[:_HASHES])


def _contains(hashes: set[str], sketch: str) -> bool:
    known = [sketch[start : start + _DIGITS] for start in range(0, len(sketch), _DIGITS)]
    return 2 * sum(one in hashes for one in known) >= len(known)


def _hash(image: str) -> str:
    return hashlib.sha256(image.encode()).hexdigest()[:_DIGITS]
