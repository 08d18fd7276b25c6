"""Random embeddings for tests that need no model."""

from __future__ import annotations

import numpy as np

from siglip.scoring import Floats


def draw_vectors(rows: int, width: int, seed: int) -> Floats:
    """Draw `rows` vectors of unit norm in random directions, float32 (N, D). The same seed gives the same vectors."""
    vectors = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)
