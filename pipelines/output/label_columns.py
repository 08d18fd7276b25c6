"""The columns `labels`, `scores` and `bands`, made of what was selected without a Python object for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from siglip.heads import name_bands
from siglip.labels import LabelSet
from siglip.scoring import Selection


def make_label_columns(chosen: Selection, labels: LabelSet, valid: NDArray[np.bool_]) -> dict[str, pa.Array]:
    """The columns of as many rows as `valid` has: null where it is False, and there `chosen` has no image.

    `bands` is among them where the label set has bands.
    """
    counts = np.zeros(len(valid), np.int64)
    counts[valid] = chosen.counts
    columns = {
        "labels": _make_lists(_name(labels.label_names(), chosen.labels), counts, valid),
        "scores": _make_lists(pa.array(chosen.scores, pa.float32()), counts, valid),
    }
    if labels.has_bands():
        bands = name_bands(chosen.labels, chosen.scores, labels)
        columns["bands"] = _make_lists(pa.array(bands, pa.string()), counts, valid)
    return columns


def _name(names: Sequence[str], chosen: NDArray[np.intp]) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(chosen))


def _make_lists(values: pa.Array, counts: NDArray[np.int64], valid: NDArray[np.bool_]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(~valid))
