"""Diff of two outputs of the same images: for each label, the images that gained or lost it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curation.tagged_output import ID, TaggedOutput
from storage.settings import ConfigError

EXAMPLES = 3
_BATCH_ROWS = 8192


@dataclass(frozen=True)
class LabelDiff:
    """How many images have the label before and after, how many gained and lost it, and the first keys of those."""

    label: str
    before: int
    after: int
    gained: int
    lost: int
    gained_by: list[str]
    lost_by: list[str]


@dataclass(frozen=True)
class OutputDiff:
    """The diff of two outputs: `changed` of the `images` have other labels.

    `labels` are those that any image gained or lost, sorted by the number of these images, most first.
    """

    images: int
    changed: int
    labels: list[LabelDiff]


def diff_outputs(before: TaggedOutput, after: TaggedOutput) -> OutputDiff:
    """Compare the written labels of two outputs, in one pass over both, with constant memory.

    Raises `ConfigError` unless both have the same images in the same shards. That holds for an output and its retagged
    output, and for two runs over the same inputs.
    """
    names = list(dict.fromkeys([*before.labels.label_names(), *after.labels.label_names()]))
    values = pa.array(names, pa.string())
    had, has, gained, lost = (_LabelCounts(len(names)) for _ in range(4))
    images = changed = 0
    for one, other in _read_both(before, after):
        old, new = _encode_labels(one, values), _encode_labels(other, values)
        new_only, old_only = np.setdiff1d(new, old, assume_unique=True), np.setdiff1d(old, new, assume_unique=True)
        for counter, codes in ((had, old), (has, new), (gained, new_only), (lost, old_only)):
            counter.add(codes, one["key"])
        changed += len(np.unique(np.concatenate([new_only, old_only]) // len(names)))
        images += len(one)
    counts = zip(had.counts, has.counts, gained.counts, lost.counts, strict=True)
    found = [
        LabelDiff(name, int(earlier), int(later), int(more), int(fewer), gained.keys[label], lost.keys[label])
        for label, (name, (earlier, later, more, fewer)) in enumerate(zip(names, counts, strict=True))
    ]
    moved = [one for one in found if one.gained or one.lost]
    return OutputDiff(images, changed, sorted(moved, key=lambda one: -(one.gained + one.lost)))


class _LabelCounts:
    """Counts images for each label, and notes the keys of the first few."""

    def __init__(self, labels: int) -> None:
        self.counts = np.zeros(labels, np.int64)
        self.keys: list[list[str]] = [[] for _ in range(labels)]

    def add(self, codes: NDArray[np.int64], keys: pa.Array) -> None:
        """Count (row, label) pairs of a batch, encoded as by `_encode_labels`. `keys` are the batch's keys."""
        rows, labels = np.divmod(codes, len(self.counts))
        self.counts += np.bincount(labels, minlength=len(self.counts))
        for label in np.flatnonzero([len(listed) < EXAMPLES for listed in self.keys]):
            listed = self.keys[label]
            listed += keys.take(pa.array(rows[labels == label][: EXAMPLES - len(listed)])).to_pylist()


def _read_both(before: TaggedOutput, after: TaggedOutput) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """Yield pairs of batches that hold the same rows of both outputs."""
    if before.rows != after.rows:
        raise ConfigError(
            f"{before.uri} has {before.rows:,} images and {after.uri} has {after.rows:,}: the images are not the same"
        )
    streams = [_read_batches(output) for output in (before, after)]
    for one, other in zip(*streams, strict=True):
        if not one[ID].equals(other[ID]) or not one["key"].equals(other["key"]):
            raise ConfigError(f"{before.uri} and {after.uri} do not have the same images in the same shards")
        yield one, other


def _read_batches(output: TaggedOutput) -> Iterator[pa.RecordBatch]:
    """Yield the output's rows in batches of `_BATCH_ROWS`, also across files. The last batch may be smaller."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in output.batches([ID, "key", "labels"], _BATCH_ROWS):
        waiting.append(batch)
        count += len(batch)
        while count >= _BATCH_ROWS:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, _BATCH_ROWS).combine_chunks().to_batches()[0]
            waiting = table.slice(_BATCH_ROWS).to_batches()
            count -= _BATCH_ROWS
    if count:
        yield pa.Table.from_batches(waiting).combine_chunks().to_batches()[0]


def _encode_labels(batch: pa.RecordBatch, names: pa.Array) -> NDArray[np.int64]:
    """Encode each (row, label) pair of a batch as one number: row * len(names) + label."""
    column = batch["labels"]
    rows = np.repeat(np.arange(len(column)), column.value_lengths().to_numpy(zero_copy_only=False))
    labels = pc.index_in(column.flatten(), value_set=names).to_numpy(zero_copy_only=False)
    return np.asarray(rows * len(names) + labels, np.int64)
