"""The labels of rows as numbers: a label's number is its place in the output's label set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curation.tagged_output import TaggedOutput


def number_labels(output: TaggedOutput) -> Mapping[str, int]:
    """Return the number of each label of an output. It does not change while the output grows."""
    return {name: number for number, name in enumerate(output.labels.label_names())}


@dataclass(frozen=True)
class RowLabels:
    """The labels of N rows, without a Python object for each: those of row i are `numbers[starts[i]:starts[i + 1]]`.

    `starts` is int64 (N + 1,) and `numbers` int32.
    """

    starts: NDArray[np.int64]
    numbers: NDArray[np.int32]

    @classmethod
    def read(cls, column: pa.ListArray, names: Mapping[str, int]) -> RowLabels:
        """Read the column `labels` of an output's rows."""
        texts = column.flatten()
        if pa.types.is_dictionary(texts.type):
            texts = texts.dictionary_decode()
        numbers = pc.fill_null(pc.index_in(texts, pa.array(list(names), texts.type)), -1)
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return cls(starts, numbers.to_numpy(zero_copy_only=False).astype(np.int32))

    @classmethod
    def join(cls, parts: Sequence[RowLabels]) -> RowLabels:
        """Return the labels of the rows of several parts, one after the other."""
        lengths = [np.zeros(1, np.int64), *(np.diff(part.starts) for part in parts)]
        numbers = [np.zeros(0, np.int32), *(part.numbers for part in parts)]
        return cls(np.cumsum(np.concatenate(lengths)), np.concatenate(numbers))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def nbytes(self) -> int:
        """The bytes in memory."""
        return self.starts.nbytes + self.numbers.nbytes

    def slice(self, start: int, stop: int) -> RowLabels:
        """Return the labels of the rows from `start` to `stop`, as views of these arrays."""
        starts = self.starts[start : stop + 1]
        return RowLabels(starts - starts[0], self.numbers[starts[0] : starts[-1]])

    def have_all(self, wanted: Sequence[int]) -> NDArray[np.bool_]:
        """Tell for each row whether it has all of these labels, bool (N,)."""
        found = np.ones(len(self), np.bool_)
        for number in wanted:
            places = np.searchsorted(self.starts, np.flatnonzero(self.numbers == number), side="right") - 1
            has = np.zeros(len(self), np.bool_)
            has[places] = True
            found &= has
        return found

    def to_arrow(self) -> Any:
        """Return them as a list array of int32."""
        return pa.ListArray.from_arrays(pa.array(self.starts.astype(np.int32)), pa.array(self.numbers))
