"""The columns `labels`, `scores` and `bands`, built from arrays without a Python object for each value."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from siglip.heads import accept_thresholds, name_bands
from siglip.labels import LabelSet
from siglip.scoring import Selection


def make_label_columns(chosen: Selection, labels: LabelSet, valid: NDArray[np.bool_]) -> dict[str, pa.Array]:
    """Build the columns `labels` and `scores`, and `bands` if the label set has bands.

    `valid` is bool (N,) for the N rows. `chosen` holds the labels of the rows where `valid` is true, in their order;
    the other rows get nulls.
    """
    counts = np.zeros(len(valid), np.int64)
    counts[valid] = chosen.counts
    columns = {
        "labels": _make_lists(_name(labels.label_names(), chosen.labels), counts, valid),
        "scores": _make_lists(pa.array(chosen.scores, pa.float32()), counts, valid),
    }
    if labels.has_bands():
        bands = name_bands(chosen.labels, chosen.scores, accept_thresholds(labels))
        columns["bands"] = _make_lists(pa.array(bands, pa.string()), counts, valid)
    return columns


def count_labels(labels: pa.ChunkedArray) -> dict[str, int]:
    """Count the images of each label. Only an image's best label counts, so the counts add up to the tagged images."""
    column = labels.combine_chunks()
    best = pc.list_element(column.filter(pc.greater(pc.list_value_length(column), 0)), 0)
    return count_values(pa.chunked_array([best]))


def count_values(column: pa.ChunkedArray) -> dict[str, int]:
    """Count how often each value occurs in a column of strings."""
    return {item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist()}


def _name(names: Sequence[str], chosen: NDArray[np.intp]) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(chosen))


def _make_lists(values: pa.Array, counts: NDArray[np.int64], valid: NDArray[np.bool_]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(~valid))
