"""Groups of images, and folds that never split a group."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.outputs import SyntheticOutput, write_output
from curation.quality.groups import assign_folds, count_groups, group_by_column, group_near_identical
from curation.quality.truth import Truth
from curation.tagged_output import open_output
from siglip.labels import LabelSet
from storage.settings import ConfigError
from tests.support.vectors import draw_vectors


def test_chains_of_near_identical_images_are_groups_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.quality.groups._BLOCK", 7)
    vectors = draw_vectors(60, 32, 0)
    # 5, 20 and 59 are a chain: neighbours have a cosine of 0.99, the ends have 0.96.
    step = vectors[1] - (vectors[1] @ vectors[5]) * vectors[5]
    step /= np.linalg.norm(step)
    for row, angle in ((20, np.arccos(0.99)), (59, 2 * np.arccos(0.99))):
        vectors[row] = np.cos(angle) * vectors[5] + np.sin(angle) * step
    vectors[40] = vectors[0]
    groups = group_near_identical(vectors)
    assert groups[5] == groups[20] == groups[59] != groups[0] == groups[40]
    assert len(np.unique(groups)) == 57
    assert set(groups) == set(range(57))
    assert len(np.unique(group_near_identical(vectors, 0.9999))) == 59


def test_no_group_is_split_and_each_fold_has_both_kinds() -> None:
    for seed in range(50):
        random = np.random.default_rng(seed)
        groups = random.integers(0, 30, 120)
        right = random.random(120) < random.uniform(0.1, 0.9)
        folds = assign_folds(groups, right, 5, seed)
        assert all(len(np.unique(folds[groups == group])) == 1 for group in np.unique(groups))
        if min(count_groups(groups, right)) >= 5:
            assert all(right[folds == fold].any() and (~right[folds == fold]).any() for fold in range(5))
    random = np.random.default_rng(0)
    right = random.random(200) < 0.3
    sizes = np.bincount(assign_folds(np.arange(200), right, 5, 1))
    assert sizes.max() - sizes.min() <= 2
    assert not np.array_equal(assign_folds(np.arange(200), right, 5, 1), assign_folds(np.arange(200), right, 5, 2))


def test_a_column_groups_images_with_the_same_value(tmp_path: Path) -> None:
    root = str(tmp_path / "made")
    made = SyntheticOutput(
        LabelSet.model_validate({"names": ["a"]}), np.eye(8, dtype=np.float32)[:1], 2, lambda n: draw_vectors(9, 8, n)
    )
    write_output(root, made)
    output = open_output(root)
    positions = np.array([1, 12, 3, 17])
    names = [str(position) for position in positions]
    none = np.zeros(0, np.int64)
    truth = Truth(positions, names, names, draw_vectors(4, 8, 9), none, none, none.astype(bool), none.astype(float))
    assert group_by_column(output, truth, "source").tolist() == [0, 1, 0, 1]
    assert group_by_column(output, truth, "metadata").tolist() == [0, 1, 2, 3]  # no image has a value
    with pytest.raises(ConfigError, match="no column 'video': use one of key, source"):
        group_by_column(output, truth, "video")
    with pytest.raises(ConfigError, match="'embedding' holds lists"):
        group_by_column(output, truth, "embedding")
