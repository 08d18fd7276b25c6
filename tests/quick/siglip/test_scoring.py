"""Selecting the labels of an image by its scores."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from siglip.scoring import select

scores = st.tuples(st.integers(0, 4), st.integers(1, 40)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
)


@given(scores, st.sampled_from([0.0, 0.1, 0.3, 1.1]), st.one_of(st.none(), st.integers(1, 45)))
def test_selection_equals_a_stable_sort_of_the_passing_scores(
    scores: np.ndarray, threshold: float, top_k: int | None
) -> None:
    selected = select(scores, threshold, top_k)
    assert len(selected.labels) == len(selected.scores) == selected.counts.sum()
    for row, (indices, values) in zip(scores, selected.rows(), strict=True):
        passing = [index for index in range(len(row)) if row[index] >= np.float32(threshold)]
        expected = sorted(passing, key=lambda index: -row[index])[:top_k]
        assert list(indices) == expected
        assert values.tolist() == row[expected].tolist()
        assert values.dtype == np.float32
