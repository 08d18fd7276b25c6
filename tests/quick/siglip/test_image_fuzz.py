"""Mutated images in decoder processes: no process dies, memory is bounded, and no other picture comes out.

`SIGHTLINE_FUZZ_SECONDS=600 pytest tests/quick/siglip/test_image_fuzz.py` runs for ten minutes with new mutations.
"""

from __future__ import annotations

import io
import os
import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from siglip.config import ImageSpec, Limits
from siglip.images.decode import DecodeMode, ImageRejected
from siglip.images.decoder import Decoder
from siglip.images.opening import FORMATS, open_image
from tests.support.image_mutations import make_seeds, mutate

SPEC = ImageSpec(size=32)
LIMITS = Limits(max_bytes=2**20, max_pixels=1_000_000, max_seconds=20)
SECONDS = float(os.environ.get("SIGHTLINE_FUZZ_SECONDS", "0"))
ROUNDS = 8
"""Mutations of each seed without `SIGHTLINE_FUZZ_SECONDS`."""
MODES: tuple[DecodeMode, ...] = ("exact", "auto", "fast")

EXPLAINED = ("unsupported", "truncated", "too_many_pixels", "too_many_bytes")
"""Reasons with which an image may be rejected although Pillow decodes it: a variant that Pillow reads wrongly, pixels
that are missing and that Pillow fills in, a limit."""

CHECKED = ("checksum", "incorrect data check", "a strip or tile of the TIFF", "zeros in the coded pixels")
"""Parts of the details with which a file is `corrupt` although Pillow decodes it: Pillow does not compare these."""


def decode_by_pillow(data: bytes) -> np.ndarray | None:
    """The small RGB image that Pillow alone makes of a file, or None where it gives up."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > LIMITS.max_pixels:
                return None
            image.load()
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
    except Exception:
        return None


def is_turned(pixels: np.ndarray, expected: np.ndarray, levels: float) -> bool:
    """Whether two small images are the same, in one of the eight orientations: Pillow alone does not apply EXIF's."""
    turns = [np.rot90(side, n) for side in (pixels, pixels[:, ::-1]) for n in range(4)]
    return any(np.abs(turn.astype(int) - expected).mean() < levels for turn in turns)


def find_fault(data: bytes, outcome: object, mode: DecodeMode) -> str | None:
    """What is wrong with a decoder's outcome for a file, or None.

    Samples out of range, which only a damaged JPEG has, come out otherwise when libjpeg shrinks the image.
    """
    levels = 6 if mode == "exact" or not data.startswith(b"\xff\xd8") else 40
    expected = decode_by_pillow(data)
    if isinstance(outcome, ImageRejected):
        if outcome.reason in ("decoder_crashed", "decoder_timeout"):
            return str(outcome)
        explained = outcome.reason in EXPLAINED or any(text in outcome.detail for text in CHECKED)
        return None if expected is None or explained else f"Pillow decodes it: {outcome}"
    if expected is None or is_turned(outcome.pixels, expected, levels):  # type: ignore[attr-defined]
        return None
    opened = open_image(data, LIMITS.max_pixels)
    if opened.covered not in (None, (0, 0, *opened.image.size)):
        return None  # Pillow fills the rest of the image with a colour; here it is transparent
    return "another picture than Pillow's"


def make_mutations(seeds: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """The same mutations at each run; with `SIGHTLINE_FUZZ_SECONDS` others, until the time is over."""
    if not SECONDS:
        for name, data in seeds.items():
            for number in range(ROUNDS):
                yield f"{name} {number}", mutate(data, random.Random(f"{name} {number}"))
        return
    end, start = time.monotonic() + SECONDS, random.randrange(2**32)
    while time.monotonic() < end:
        for name, data in seeds.items():
            start += 1
            yield f"{name} {start}", mutate(data, random.Random(f"{name} {start}"))


def read_peak(pid: int) -> int:
    """The largest resident memory that a process has had, in bytes."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_mutated_images_never_kill_a_decoder_or_become_another_picture() -> None:
    seeds = make_seeds()
    decoders = {mode: Decoder(SPEC, LIMITS, mode, thumbnail=16) for mode in MODES}
    faults, tagged = [], 0
    peak = 0
    try:
        for number, (name, data) in enumerate(make_mutations(seeds)):
            mode = MODES[number % len(MODES)]
            decoder = decoders[mode]
            [outcome] = decoder.decode([data])
            if fault := find_fault(data, outcome, mode):
                faults.append((name, fault))
            tagged += not isinstance(outcome, ImageRejected)
            if decoder.pid is not None:
                peak = max(peak, read_peak(decoder.pid))
    finally:
        for decoder in decoders.values():
            decoder.close()
    assert faults == []
    assert tagged > 40, "many mutations leave an image"
    assert peak < 2**29, "the memory of the libraries, and of a megapixel"
