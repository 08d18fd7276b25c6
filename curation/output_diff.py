"""Two outputs of the same images side by side: which label was given to which of them, before and after."""

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
_ROWS = 8192


@dataclass(frozen=True)
class LabelDiff:
    """How many images have a label before and after, how many gained or lost it, and the keys of the first of these."""

    label: str
    before: int
    after: int
    gained: int
    lost: int
    gained_by: list[str]
    lost_by: list[str]


@dataclass(frozen=True)
class OutputDiff:
    """`changed` of `images` have other labels. `labels` are those that any image gained or lost, most first."""

    images: int
    changed: int
    labels: list[LabelDiff]


def diff_outputs(before: TaggedOutput, after: TaggedOutput) -> OutputDiff:
    """Compare the labels that were written, in one pass over both, with flat memory.

    Raises `ConfigError` when they are not of the same images in the same shards, as an output and what was retagged
    from it are, or two runs over the same inputs.
    """
    names = list(dict.fromkeys([*before.labels.label_names(), *after.labels.label_names()]))
    values = pa.array(names, pa.string())
    had, has, gained, lost = (_Tally(len(names)) for _ in range(4))
    images = changed = 0
    for one, other in _pair(before, after):
        old, new = _code(one, values), _code(other, values)
        new_only, old_only = np.setdiff1d(new, old, assume_unique=True), np.setdiff1d(old, new, assume_unique=True)
        for tally, codes in ((had, old), (has, new), (gained, new_only), (lost, old_only)):
            tally.add(codes, one["key"])
        changed += len(np.unique(np.concatenate([new_only, old_only]) // len(names)))
        images += len(one)
    counts = zip(had.counts, has.counts, gained.counts, lost.counts, strict=True)
    found = [
        LabelDiff(name, int(earlier), int(later), int(more), int(fewer), gained.keys[label], lost.keys[label])
        for label, (name, (earlier, later, more, fewer)) in enumerate(zip(names, counts, strict=True))
    ]
    moved = [one for one in found if one.gained or one.lost]
    return OutputDiff(images, changed, sorted(moved, key=lambda one: -(one.gained + one.lost)))


class _Tally:
    """For each label a count of images, and the keys of the first few."""

    def __init__(self, labels: int) -> None:
        self.counts = np.zeros(labels, np.int64)
        self.keys: list[list[str]] = [[] for _ in range(labels)]

    def add(self, codes: NDArray[np.int64], keys: pa.Array) -> None:
        """Count rows of a batch, numbered as `_code` does."""
        rows, labels = np.divmod(codes, len(self.counts))
        self.counts += np.bincount(labels, minlength=len(self.counts))
        for label in np.flatnonzero([len(listed) < EXAMPLES for listed in self.keys]):
            listed = self.keys[label]
            listed += keys.take(pa.array(rows[labels == label][: EXAMPLES - len(listed)])).to_pylist()


def _pair(before: TaggedOutput, after: TaggedOutput) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """Batches of the same rows of both."""
    if before.rows != after.rows:
        raise ConfigError(
            f"{before.uri} has {before.rows:,} images and {after.uri} {after.rows:,}: they are not the same"
        )
    streams = [_slice(output) for output in (before, after)]
    for one, other in zip(*streams, strict=True):
        if not one[ID].equals(other[ID]) or not one["key"].equals(other["key"]):
            raise ConfigError(f"{before.uri} and {after.uri} do not have the same images in the same shards")
        yield one, other


def _slice(output: TaggedOutput) -> Iterator[pa.RecordBatch]:
    """The output's rows, `_ROWS` at a time whatever the sizes of its files."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in output.batches([ID, "key", "labels"], _ROWS):
        waiting.append(batch)
        count += len(batch)
        while count >= _ROWS:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, _ROWS).combine_chunks().to_batches()[0]
            waiting = table.slice(_ROWS).to_batches()
            count -= _ROWS
    if count:
        yield pa.Table.from_batches(waiting).combine_chunks().to_batches()[0]


def _code(batch: pa.RecordBatch, names: pa.Array) -> NDArray[np.int64]:
    """A number for each label of each row: row * labels + label."""
    column = batch["labels"]
    rows = np.repeat(np.arange(len(column)), column.value_lengths().to_numpy(zero_copy_only=False))
    labels = pc.index_in(column.flatten(), value_set=names).to_numpy(zero_copy_only=False)
    return np.asarray(rows * len(names) + labels, np.int64)
