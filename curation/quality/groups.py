"""Groups of answered images that belong together, and folds of cross-validation that never split a group."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curation.quality.truth import Truth
from curation.tagged_output import TaggedOutput
from siglip.scoring import Floats
from storage.settings import ConfigError

NEAR_IDENTICAL = 0.98
"""The cosine of two embeddings from which their images count as near-identical.

Of 500 rendered images, embedded by the shipped checkpoint, 99 % keep a cosine to themselves of at least 0.975 when they
are saved again as a JPEG of quality 85, and of 0.998 when they are reduced to three quarters and enlarged. Different
images of one of the checkpoint's 64 labels have a median cosine of 0.956.
"""
_BLOCK = 2048
"""Rows of the matrix of cosines that are computed at a time."""


def group_near_identical(embeddings: Floats, cosine: float = NEAR_IDENTICAL) -> NDArray[np.int64]:
    """Number the groups of near-identical images: int64 (M,), from 0.

    `embeddings` are (M, D) of unit norm. Two images are in one group when a chain of images connects them in which each
    has at least this cosine to the next. So no image has a near-identical one in another group; but a group may hold
    images that are far from each other. All M^2 cosines are computed.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    groups = np.arange(len(embeddings))
    for one, other in _find_pairs(embeddings, cosine):
        # The groups found so far are the nodes: the edges of many alike images need not be kept.
        count = int(groups.max()) + 1
        edges = np.unique(groups[one] * count + groups[other])
        graph = coo_array((np.ones(len(edges), bool), np.divmod(edges, count)), shape=(count, count))
        groups = connected_components(graph, directed=False)[1][groups].astype(np.int64)
    return groups


def group_by_column(output: TaggedOutput, truth: Truth, column: str) -> NDArray[np.int64]:
    """Number the groups of answered images with the same value in a column of the output: int64 (M,), from 0.

    An image without a value is a group of its own. Raises `ConfigError` for a column that the output does not have, and
    for one that holds no plain values: lists such as `embedding`, or structures.
    """
    if column not in output.columns:
        raise ConfigError(f"--group-by: {output.uri} has no column {column!r}: use one of {', '.join(output.columns)}")
    if pa.types.is_nested(output.format.data_schema().field(column).type):
        raise ConfigError(f"--group-by: the column {column!r} holds lists or structures: use a column of plain values")
    values = output.take(truth.positions, [column])[column].to_pylist()
    numbers: dict[object, int] = {}
    return np.asarray(
        [numbers.setdefault(object() if value is None else (value,), len(numbers)) for value in values], np.int64
    )


def assign_folds(groups: NDArray[np.int64], right: NDArray[np.bool_], count: int, seed: int) -> NDArray[np.int64]:
    """Assign A answers to `count` folds, int64 (A,), so that the answers of one group share a fold.

    `groups` (A,) is the group of each answer's image. Groups with both kinds of answers are dealt out first, and then
    those with right and those with wrong answers alone: the largest first, and in random order among those of one size.
    So each fold has a right and a wrong answer when `count_groups` finds at least `count` groups of each kind.
    """
    _, position = np.unique(groups, return_inverse=True)
    size = np.bincount(position)
    rights = np.bincount(position, weights=right)
    has_right, has_wrong = rights > 0, rights < size
    shuffled = np.random.default_rng(seed).permutation(len(size))
    order = shuffled[np.argsort(-size[shuffled], kind="stable")]
    folds = np.empty(len(size), np.int64)
    mixed = order[(has_right & has_wrong)[order]]
    folds[mixed] = np.arange(len(mixed))
    for alone in (~has_wrong, ~has_right):
        rest = order[alone[order]]
        folds[rest] = np.arange(len(rest)) + len(mixed)
    return np.asarray(folds[position] % count, np.int64)


def count_groups(groups: NDArray[np.int64], right: NDArray[np.bool_]) -> tuple[int, int]:
    """The number of groups with a right answer, and the number of groups with a wrong answer."""
    return len(np.unique(groups[right])), len(np.unique(groups[~right]))


def _find_pairs(embeddings: Floats, cosine: float) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    for first in range(0, len(embeddings), _BLOCK):
        cosines = embeddings[first : first + _BLOCK] @ embeddings[first:].T
        one, other = np.nonzero(cosines >= cosine)
        later = one < other
        yield one[later] + first, other[later] + first
