"""Outputs for tests of exports: keys that are awkward as file names, passed-through columns of many types, images."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.outputs import SyntheticOutput, write_output
from curation.tagged_output import TaggedOutput, open_output
from siglip.labels import LabelSet
from siglip.scoring import Scale
from tests.support.vectors import draw_vectors

WIDTH, ROWS = 16, 60
LABELS = ["zebra", "cat & <dog>", "a|b", "日本 🐈", 'it\'s "quoted"', "in/doors", "outdoors"]
"""Not in alphabetical order, and with characters that XML, paths and separators make special."""
KEYS = [
    "photos/2024/a.jpg",
    "photos/2024/a.png",
    "photos/2024.05/a.b.c.jpg",
    "with space and 'quote\".jpg",
    "日本/写真 🐈.jpg",
    "日本/写真 🐕.jpg",
    "\u00e9.jpg",
    "e\u0301.jpg",
    "no_extension",
    "a.jpg",
    "A.JPG",
    "a.jpg/b.jpg",
    "x/../../../escape.jpg",
    "/absolute/path.jpg",
    "trailing/",
    ".hidden",
    "-dash.jpg",
    "tab\tand\nline.jpg",
    "back\\slash.jpg",
    "test/val_1.jpg",
    "train/test-2.jpg",
    "100%25 [x]*?#&;::.jpg",
    "same.jpg",
    "same.jpg",
    "long/" + "k" * 400 + ".jpg",
    "long/" + "k" * 400 + ".png",
    "d/" * 700 + "deep.jpg",
    "<b>&amp;</b>.jpg",
    "metadata.parquet",
    "%(asctime)s {0}.jpg",
]
"""Keys that collide when they are cleaned, lead out of a folder, or are too long; two images have the same key."""
PASSED = pa.schema(
    [
        ("caption", pa.string()),
        ("number", pa.int64()),
        ("weight", pa.float64()),
        ("tags", pa.list_(pa.string())),
        ("box", pa.struct([("x", pa.float32()), ("name", pa.string())])),
        ("taken", pa.timestamp("us", "UTC")),
        ("price", pa.decimal128(9, 2)),
        ("raw", pa.binary()),
        ("filepath", pa.string()),
    ]
)


def draw(row: int, format: str = "PNG") -> bytes:
    """An image of one colour, which differs for each row."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), ((row * 37) % 256, (row * 91) % 256, row % 256)).save(buffer, format)
    return buffer.getvalue()


def make_key(row: int) -> str:
    """The key of a row: the awkward ones first, then plain ones."""
    return KEYS[row] if row < len(KEYS) else f"plain/{row:05d}.png"


def make_output(
    root: Path | str,
    *,
    rows: int = ROWS,
    dtype: Literal["float32", "float16"] = "float32",
    thumbnails: bool = True,
    passed: bool = False,
    bands: bool = False,
    sources: Sequence[str] | None = None,
    shards: int = 3,
) -> TaggedOutput:
    """Write an output of three shards with seven labels, of which an image has none to three, and one rejected row.

    The tagged image of a row is `draw(row)`. `sources` are the files that hold the images; without them a tar does.
    """
    names: list[Any] = [{"name": name, "accept": 0.9} if bands else name for name in LABELS]
    labels = LabelSet.model_validate(
        {"names": names, "threshold": 0.8, "top_k": 3, "groups": {"in|out": LABELS[-2:]} if not bands else {}}
    )
    per = -(-rows // shards)

    def make_values(part: range) -> Mapping[str, Any]:
        values: dict[str, Any] = {
            "metadata": [None if row % 3 else f'{{"json":{{"n":{row},"big":12345678901234567890123}}}}' for row in part]
        }
        if sources is not None:
            values["source"] = [sources[row] for row in part]
        values["sha256"] = [hashlib.sha256(draw(row)).hexdigest() for row in part]
        if passed:
            values["caption"] = [None if row % 4 == 0 else f"caption {row} é \"'&\n" for row in part]
            values["number"] = [2**53 + row for row in part]
            values["weight"] = [[0.1, float("nan"), float("inf"), None][row % 4] for row in part]
            values["tags"] = [[[], ["a", None, "b"], None][row % 3] for row in part]
            values["box"] = [{"x": 0.5, "name": "n"} if row % 2 else None for row in part]
            values["taken"] = [datetime(2024, 5, 1, 12, 30, 0, row, tzinfo=UTC) for row in part]
            values["price"] = [Decimal(row) / 4 for row in part]
            values["raw"] = [bytes([0, row % 256]) for row in part]
            values["filepath"] = ["not a path"] * len(part)
        return {
            name: pa.array(column, PASSED.field(name).type) if name in PASSED.names else column
            for name, column in values.items()
        }

    made = SyntheticOutput(
        labels,
        draw_vectors(len(LABELS), WIDTH, 5),
        shards,
        lambda shard: draw_vectors(min(per, rows - shard * per), WIDTH, shard),
        dtype=dtype,
        scale=Scale(20, -4),
        thumbnail=(lambda row: draw(row, "JPEG")) if thumbnails else None,
        key=make_key,
        reject=lambda shard: ["truncated"] if shard == 1 else [],
        passed=PASSED if passed else pa.schema([]),
        values=make_values,
    )
    write_output(str(root), made)
    return open_output(str(root))


def read_rows(output: TaggedOutput) -> dict[str, dict[str, Any]]:
    """The rows of an output by their ids, each with `vector`, float32 (D,) of unit norm, and scores as float32 (K,)."""
    from curation.tagged_output import read_embeddings

    rows = {}
    for batch in output.batches(["id", *output.columns]):
        for row, vector in zip(batch.to_pylist(), read_embeddings(batch), strict=True):
            row["vector"], row["scores"] = vector, np.asarray(row["scores"], np.float32)
            rows[row["id"]] = row
    return rows


def write_images(folder: Path, output: TaggedOutput) -> None:
    """Write the images of an output's rows under their keys, where a key is a path that can be used as it stands."""
    for row, key in enumerate(output.to_arrow(["key"])["key"].to_pylist()):
        path = folder / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(draw(row))
        except OSError:
            continue
