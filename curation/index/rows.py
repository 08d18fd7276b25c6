"""Rows of an output as a search compares them: those that its index does not have."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curation.index.labels import RowLabels, number_labels
from curation.index.table import number_shard
from curation.tagged_output import TaggedOutput, read_embeddings
from siglip.scoring import Floats


@dataclass(frozen=True)
class RowBatch:
    """N rows of one shard: their numbers in it, int64 (N,), keys, labels, and embeddings, float32 (N, D)."""

    shard: int
    rows: NDArray[np.int64]
    keys: pa.StringArray
    labels: RowLabels
    embeddings: Floats

    @classmethod
    def join(cls, parts: Sequence[RowBatch]) -> RowBatch:
        """Return the rows of several batches of one shard."""
        return cls(
            parts[0].shard,
            np.concatenate([part.rows for part in parts]),
            pa.concat_arrays([part.keys for part in parts]),
            RowLabels.join([part.labels for part in parts]),
            np.concatenate([part.embeddings for part in parts]),
        )

    def slice(self, start: int, count: int) -> RowBatch:
        """Return some of the rows. Their arrays are views of these."""
        stop = start + count
        return RowBatch(
            self.shard,
            self.rows[start:stop],
            self.keys.slice(start, count),
            self.labels.slice(start, stop),
            self.embeddings[start:stop],
        )

    def find_key(self, key: str) -> list[tuple[int, int]]:
        """Return shard and row of the rows with a key."""
        places = np.flatnonzero(pc.equal(self.keys, pa.scalar(key, pa.string())).to_numpy(zero_copy_only=False))
        return [(self.shard, int(self.rows[place])) for place in places.tolist()]

    @property
    def nbytes(self) -> int:
        """The bytes in memory."""
        return int(self.rows.nbytes + self.keys.nbytes + self.labels.nbytes + self.embeddings.nbytes)


def read_row_batches(output: TaggedOutput, shards: Collection[str]) -> Iterator[RowBatch]:
    """Yield the rows of some shards, in the order of the output. Raises `storage.store.StoreError`."""
    names = number_labels(output)
    for shard, _, batch in output.shard_batches(shards, ["row", "key", "labels", "embedding"]) if shards else ():
        yield RowBatch(
            number_shard(shard),
            batch["row"].to_numpy().astype(np.int64),
            batch["key"].cast(pa.string()),
            RowLabels.read(batch["labels"], names),
            read_embeddings(batch),
        )
