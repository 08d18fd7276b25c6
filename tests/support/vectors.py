"""Made-up embeddings."""

from __future__ import annotations

import numpy as np

from siglip.scoring import Floats


def draw_vectors(rows: int, width: int, seed: int) -> Floats:
    """Vectors of unit norm in all directions, float32 (N, D): the same for the same seed."""
    vectors = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)
