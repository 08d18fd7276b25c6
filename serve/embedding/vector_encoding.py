"""Encodings of embeddings: the number formats and the base64 that vendors' clients ask for."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from siglip.scoring import Floats

NumberType = Literal["float", "int8", "uint8", "binary", "ubinary"]


@dataclass
class VectorEncoding:
    """How a response writes embeddings: as numbers, or with `as_base64` as base64 of their bytes.

    * `numbers`: see `quantize`.
    * `half_precision`: base64 of `float` is of float16, else of float32. Lists of floats are float32 always.
    * `big_endian`: the byte order in base64, else little-endian.
    """

    numbers: NumberType = "float"
    as_base64: bool = False
    half_precision: bool = False
    big_endian: bool = False

    def encode(self, vectors: Floats) -> list[Any]:
        """Encode embeddings (N, D): one array of numbers or one string of base64 for each."""
        rows = quantize(vectors, self.numbers)
        if not self.as_base64:
            return list(rows)
        if self.numbers == "float":
            rows = rows.astype((">" if self.big_endian else "<") + ("f2" if self.half_precision else "f4"))
        return [base64.b64encode(row.tobytes()).decode("ascii") for row in rows]


def quantize(vectors: Floats, numbers: NumberType) -> NDArray[Any]:
    """Embeddings (N, D) in another number format, one row for each.

    * `float`: float32, unchanged.
    * `int8`: each vector is scaled so that the absolute value of its largest component is 127. Without scaling, the
      small components of a unit vector (768 of them) would all round to a few levels. Cosines stay the same up to
      rounding; lengths are lost. `uint8` is `int8` plus 128.
    * `ubinary`: one bit for each component, set if it is positive. Eight components make a number from 0 to 255, with
      the first component in the highest bit. `binary` is `ubinary` minus 128. D must be a multiple of eight, as
      SigLIP's is.
    """
    if numbers == "float":
        return vectors
    rows: NDArray[Any]
    if numbers in ("int8", "uint8"):
        largest = np.abs(vectors).max(axis=1, keepdims=True, initial=1e-12)
        levels = np.rint(vectors / largest * 127).astype(np.int16)
        rows = levels.astype(np.int8) if numbers == "int8" else (levels + 128).astype(np.uint8)
    else:
        bits = np.packbits(vectors > 0, axis=1)
        rows = bits if numbers == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    return rows
