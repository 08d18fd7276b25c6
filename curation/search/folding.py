"""Near-duplicates among the results of a search, of which one is shown."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from curation.tagged_output import TaggedOutput, read_embeddings
from siglip.scoring import Floats

FOLD_COSINE = 0.97
"""Images whose embeddings have at least this cosine are one result. That they are copies of each other is not certain:
`sightline dedup` compares their thumbnails too."""
_BLOCK = 256
"""Rows that are compared with those that stay at once."""


def fold_duplicates(
    output: TaggedOutput, positions: NDArray[np.int64], top: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Fold the rows at `positions`, int64 (N,), as `fold_embeddings` does.

    Memory holds the embeddings of all N rows.
    """
    if not len(positions):
        return positions, positions
    return fold_embeddings(read_embeddings(output.take(positions, ["embedding"])), top)


def fold_embeddings(embeddings: Floats, top: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Fold rows into the first one that they are near-duplicates of, in the order of `embeddings`, float32 (N, D).

    Returns the indices of the rows that stay, up to `top` of them, and for each the number of rows that are folded into
    it. Each row is compared with the rows that stay, and not with those that are folded, so there are no chains.
    """
    kept: list[int] = []
    copies: list[int] = []
    for start in range(0, len(embeddings), _BLOCK):
        block = embeddings[start : start + _BLOCK]
        # One product for many rows: it rounds otherwise than one for each row, by less than 1e-6.
        cosines = np.concatenate([block @ embeddings[kept].T, np.zeros((len(block), len(block)), np.float32)], axis=1)
        inside = block @ block.T
        for row in range(len(block)):
            found = cosines[row, : len(kept)]
            if len(found) and found[nearest := int(found.argmax())] >= FOLD_COSINE:
                copies[nearest] += 1
            elif len(kept) < top:
                cosines[:, len(kept)] = inside[:, row]
                kept.append(start + row)
                copies.append(0)
    return np.asarray(kept, np.int64), np.asarray(copies, np.int64)
