"""The self-test of a loaded checkpoint: mistakes that change every score, and that no error would show otherwise.

Each check is about a mistake that people have made with SigLIP: texts that were padded to the longest of a batch, not
lower-cased, or cut at another length; an embedding that was read at another position than the last; a dtype whose
embeddings are not those of float32. They hold for any checkpoint, so they need no known numbers. For checkpoints in
`known.json`, the cosines of known images and texts are compared with those that were computed once.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from siglip.checkpoints.files import CheckpointError
from siglip.config import ImageSpec
from siglip.families.tokenizer import Tokenizer
from siglip.images.patches import pack_patches
from siglip.scoring import Floats, format_cosine
from siglip.towers.naflex import NaFlexTower
from siglip.towers.text import TextTower

KNOWN = Path(__file__).parent / "known.json"
"""The cosines of `draw_images` and `TEXTS`, float32, for known checkpoints by their identity."""
TEXTS = ("a photo of a dog", "a red circle", "A Blue Square", "two people on a beach at night")
LEAST_COSINE = 0.999
"""The lowest cosine of an embedding with that of float32."""
KNOWN_TOLERANCE = {torch.float32: 0.001, torch.bfloat16: 0.01, torch.int8: 0.02}
"""How far cosines may be from the known ones. In the checkpoint that ships, bfloat16 moves one by up to 0.004, and
int8 by up to 0.007."""
_WORDS = "dog cat house tree "


@dataclass(frozen=True)
class KnownCosines:
    """What is known of a checkpoint: its `name`, and the cosines of each image with each text, float32 (3, 4)."""

    name: str
    cosines: Floats


def draw_images(spec: ImageSpec) -> NDArray[np.uint8]:
    """Return three images that any machine draws alike, uint8 (3, *spec.shape): a gradient, a chessboard, a disc.

    For a NaFlex model they have three shapes: half as many patches as it takes at most, a wide grid and a high one.
    """
    if spec.patches is None:
        assert spec.size is not None
        return _draw(spec.size, spec.size)
    side, most = spec.patches.size, spec.patches.count
    square, short = max(1, math.isqrt(most // 2)), max(1, math.isqrt(most) // 2)
    grids = (square, square), (short, 2 * short), (2 * short, short)
    drawn = [_draw(rows * side, columns * side)[kind] for kind, (rows, columns) in enumerate(grids)]
    return np.stack([pack_patches(pixels, spec.patches) for pixels in drawn])


def _draw(height: int, width: int) -> NDArray[np.uint8]:
    """Draw the three images in one size: uint8 (3, H, W, 3)."""
    rows, columns = np.mgrid[0:height, 0:width]
    along, down = (255 * columns) // max(1, width - 1), (255 * rows) // max(1, height - 1)
    gradient = np.stack([along, down, 255 - along], axis=-1)
    odd = ((rows * 8 // height + columns * 8 // width) % 2)[..., None]
    chessboard = np.where(odd, [220, 30, 30], [30, 60, 200])
    radius = min(height, width) / 3
    inside = ((rows - height / 2) ** 2 + (columns - width / 2) ** 2 < radius**2)[..., None]
    disc = np.where(inside, [40, 170, 60], [128, 128, 128])
    return np.stack([gradient, chessboard, disc]).astype(np.uint8)


def check_tokenizer(tokenizer: Tokenizer, length: int) -> None:
    """Check how texts become token ids. Raises `CheckpointError`."""
    ids, counts = tokenizer.encode(["a dog", "A Dog", TEXTS[-1], _WORDS * length])
    if ids.shape != (4, length):
        raise _failed(
            f"texts have {ids.shape[1]} tokens, and the model reads {length}: texts must be padded to the full length",
            "install the version of transformers that constraints.txt names",
        )
    if not np.array_equal(ids[0], ids[1]):
        raise _failed("'A Dog' and 'a dog' have other tokens, and SigLIP was trained on lower-case texts")
    padding = ids[0, -1]
    end = int(counts[0])
    if not (end < length and (ids[0, end:] == padding).all() and (ids[2, int(counts[2]) :] == padding).all()):
        raise _failed("the tokens after a text's end are not all the same: texts must be padded on the right")
    if int(counts[3]) <= length or np.array_equal(ids[3, -2:], ids[0, -2:]):
        raise _failed("a text that is too long does not fill all positions")
    alone = tokenizer.encode(["a dog"])[0]
    if not np.array_equal(alone[0], ids[0]):
        raise _failed("a text has other tokens beside longer ones")


def check_position(tower: TextTower, ids: NDArray[np.int64]) -> None:
    """Check that a text's embedding is that of the last position. Raises `CheckpointError`.

    `ids` are the token ids of one text or more, int64 (N, T). The layers' output is replaced by given numbers, so that
    the layers cost no time: changed at all positions but the last it must give the same embedding, and changed at the
    last another one.
    """
    weight = tower.head.weight
    rows = torch.from_numpy(ids).to(weight.device)
    given = torch.randn(*ids.shape, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)

    def embed(hidden: torch.Tensor) -> torch.Tensor:
        layers, tower.encoder = tower.encoder, _Layers(hidden)
        try:
            output: torch.Tensor = tower(rows)
            return output
        finally:
            tower.encoder = layers

    others, last = given.clone(), given.clone()
    others[:, :-1] = given[:, :-1].flip(-1)
    last[:, -1] = given[:, -1].flip(-1)
    with torch.inference_mode():
        same = embed(given)
        if not torch.equal(same, embed(others)) or torch.equal(same, embed(last)):
            raise _failed("the embedding of a text is not read at the last position, where SigLIP has it")


def check_padding(tower: NaFlexTower, patches: torch.Tensor, grids: torch.Tensor) -> None:
    """Check that what a NaFlex model gets after an image's last patch does not change the embedding.

    The arguments are those of `siglip.towers.naflex.NaFlexTower`, with an image that has fewer patches than there is
    room for. Only the first layer is computed. Raises `CheckpointError`: this device's attention ignores its mask.
    """
    count = grids.prod(dim=1)[:, None, None]
    place = torch.arange(patches.shape[1], device=patches.device)[None, :, None]
    other = torch.where(place < count, patches, 8 - patches)
    layers, tower.encoder.layers = tower.encoder.layers, tower.encoder.layers[:1]
    try:
        with torch.inference_mode():
            found, spoiled = tower(patches, grids), tower(other, grids)
    finally:
        tower.encoder.layers = layers
    cosine = float(torch.nn.functional.cosine_similarity(found.float(), spoiled.float()).min())
    if not cosine >= LEAST_COSINE:
        raise _failed(
            f"an image's embedding changes with what follows its last patch (cosine {cosine:.4f}), so attention "
            "ignores its mask here",
            "install the version of torch that constraints.txt names, or use model.device: cpu",
        )


class _Layers(nn.Module):
    """Stands in for the layers of a tower, and returns given numbers."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._hidden


def check_dtype(
    found: Floats, expected: Floats, dtype: torch.dtype, what: str, least: float = LEAST_COSINE
) -> float | None:
    """Check embeddings, float32 (N, D), against those of float32. Return the lowest cosine, None if there are none.

    Raises `CheckpointError`, which names the dtype, if it is below `least`.
    """
    if not len(found) or not np.isfinite(expected).all():  # broken weights are another matter
        return None
    name = str(dtype).removeprefix("torch.")
    lowest = float((found * expected).sum(axis=1).min())
    if not lowest >= least:
        needed, other = (
            (f"{least:.12g} (model.min_cosine)", "auto") if dtype == torch.int8 else (f"{least:g}", "float32")
        )
        raise CheckpointError(
            f"model.dtype: {name}: embeddings of {what} have a cosine of {format_cosine(lowest)} with those of "
            f"float32, and {needed} is needed: use model.dtype: {other}"
        )
    return lowest


def check_known(identity: str, images: Floats, texts: Floats, dtype: torch.dtype) -> bool:
    """Compare the cosines of `draw_images` and `TEXTS` with the known ones. Returns whether there are any.

    `images` are float32 (3, D), `texts` (4, D). Raises `CheckpointError` if one is too far from the known one.
    """
    known = read_known().get(identity)
    if known is None:
        return False
    differences = np.abs(images @ texts.T - known.cosines)
    tolerance = KNOWN_TOLERANCE.get(dtype, max(KNOWN_TOLERANCE.values()))
    if not differences.max() <= tolerance:
        image, text = np.unravel_index(int(differences.argmax()), differences.shape)
        raise _failed(
            f"{known.name} has a cosine of {known.cosines[image, text]:.4f} for known image {image} and "
            f"{TEXTS[text]!r}, and {float(images[image] @ texts[text]):.4f} was found here",
            "install the versions of torch and transformers that constraints.txt names",
        )
    return True


@cache
def read_known() -> dict[str, KnownCosines]:
    """Read what is known of checkpoints, by identity."""
    entries = json.loads(KNOWN.read_text(encoding="utf-8"))
    return {
        identity: KnownCosines(entry["name"], np.asarray(entry["cosines"], np.float32))
        for identity, entry in entries.items()
    }


def _failed(what: str, fix: str = "") -> CheckpointError:
    return CheckpointError(f"model.source: self-test: {what}{': ' if fix else ''}{fix}")
