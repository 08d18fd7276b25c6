"""Rows of an output as a search compares them: those that its index does not have."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
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
