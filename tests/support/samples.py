"""Samples of questions for tests, made without an output."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def make_sample(
    labels: Sequence[str], sample: str = "s1", sources: Sequence[tuple[str, str]] | None = None
) -> pa.Table:
    """Make the questions of a sample: one about each of `labels`, each about another image.

    `sources` are the source and the sha256 of each image.
    """
    count = len(labels)
    places = sources or [(f"/images/{row}.jpg", f"{row:064x}") for row in range(count)]
    return pa.table(
        {
            "id": [f"000000-000000/{row}" for row in range(count)],
            "key": [f"{row}.jpg" for row in range(count)],
            "source": [source for source, _ in places],
            "sha256": [digest for _, digest in places],
            "label": list(labels),
            "score": pa.array([0.5] * count, pa.float32()),
            "stratum": [0] * count,
            "weight": [2.0] * count,
            "sample": [sample] * count,
        }
    )


def write_sample_files(folder: Path, sample: pa.Table, thumbnail: Callable[[int], bytes]) -> None:
    """Write the files of a sample to a folder, with a thumbnail for each row."""
    folder.mkdir(parents=True, exist_ok=True)
    table = sample.append_column("thumbnail", pa.array([thumbnail(row) for row in range(sample.num_rows)], pa.binary()))
    pq.write_table(table, folder / "sample.parquet")
    (folder / "sample.json").write_text(json.dumps({"output": "/made by/a test", "for": "precision=0.95"}))
