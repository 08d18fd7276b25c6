"""The decoder's process: what hangs or wants too much memory costs itself alone, and nothing is decoded twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from siglip.config import ImageSpec, Limits
from siglip.decoder import Decoder
from siglip.images import ImageRejected
from tests.images import encode, make_rgb

HOOK = """
import os, time
from PIL import JpegImagePlugin
original = JpegImagePlugin.JpegImageFile.load
def load(self, *arguments):
    with open({log!r}, "a") as log:
        print(self.width, file=log)
    if self.width == 14:
        time.sleep(600)
    if self.width == 15:
        self.hoard = bytearray(4 * 2**30)
    return original(self, *arguments)
JpegImagePlugin.JpegImageFile.load = load
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lets a decoder's child write down what it decodes, sleep at a width of 14 and take 4 GiB at one of 15."""
    log = tmp_path / "decoded"
    (tmp_path / "sitecustomize.py").write_text(HOOK.format(log=str(log)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return log


def decode(widths: list[int], limits: Limits) -> list[str | int]:
    """For each width the image's reason, or its width."""
    decoder = Decoder(ImageSpec(size=32), limits)
    try:
        outcomes = decoder.decode([encode(make_rgb(width, 30), "JPEG") for width in widths])
    finally:
        decoder.close()
    return [outcome.reason if isinstance(outcome, ImageRejected) else outcome.width for outcome in outcomes]


def test_a_hang_costs_no_second_decode_of_the_others(log: Path) -> None:
    widths = [20, 21, 14, 22]
    assert decode(widths, Limits(max_seconds=1)) == [20, 21, "decoder_timeout", 22]
    seen = [int(line) for line in log.read_text().split()]
    assert sorted(set(seen)) == sorted(widths)
    assert all(seen.count(width) <= seen.count(20) for width in widths), "once each"


def test_an_image_that_wants_too_much_memory_is_rejected(log: Path) -> None:
    assert decode([20, 15, 21], Limits(max_pixels=1_000_000, max_bytes=2**20)) == [20, "corrupt", 21]
    assert decode([1000], Limits(max_pixels=30_000)) == [1000], "what is allowed finds room"
