"""Example images of a report page, as JPEG data URIs that together fit in a number of bytes."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from curation.tagged_output import ID, TaggedOutput

_SIZES = ((160, 78), (128, 72), (96, 68), (72, 62), (48, 55))
"""Longest side in pixels and JPEG quality. They are tried in turn until a page's pictures fit."""


def read_images(output: TaggedOutput, positions: Iterable[int]) -> tuple[dict[int, str], dict[int, bytes]]:
    """Read the keys and the thumbnails of images by position. The thumbnails are empty when the output has none."""
    wanted = sorted(set(positions))
    rows = output.take(wanted, ["key", *(["thumbnail"] if "thumbnail" in output.columns else [])])
    keys = dict(zip(wanted, rows["key"].to_pylist(), strict=True))
    if "thumbnail" not in rows.column_names:
        return keys, {}
    return keys, dict(zip(wanted, rows["thumbnail"].to_pylist(), strict=True))


def find_positions(output: TaggedOutput, ids: list[str]) -> dict[str, int]:
    """Find the positions of images by id, in one pass over the ids of the output. Unknown ids are left out."""
    positions: dict[str, int] = {}
    wanted = pa.array(ids, pa.string())
    first = 0
    for batch in output.batches([ID], rows=65_536) if ids else ():
        rows = np.flatnonzero(pc.is_in(batch[ID], value_set=wanted).to_numpy(zero_copy_only=False))
        positions.update(zip(batch[ID].take(pa.array(rows)).to_pylist(), (first + rows).tolist(), strict=True))
        first += len(batch)
    return positions


def encode_pictures(thumbnails: Mapping[Any, bytes], uses: Counter[Any], max_bytes: int) -> dict[Any, str]:
    """Encode thumbnails as data URIs, in the largest size in which all of their uses fit in `max_bytes`.

    `uses` is how often the page shows each thumbnail. Returns nothing when even the smallest size does not fit.
    """
    for side, quality in _SIZES:
        encoded = {name: _encode(data, side, quality) for name, data in thumbnails.items() if data}
        if sum(uses[name] * len(uri) for name, uri in encoded.items()) <= max_bytes:
            return encoded
    return {}


def _encode(data: bytes, side: int, quality: int) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.thumbnail((side, side))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True)
    except OSError:  # not a thumbnail that Sightline wrote
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
