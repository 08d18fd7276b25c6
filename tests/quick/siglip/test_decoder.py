"""The decoder's process: what hangs or wants too much memory costs itself alone, and nothing is decoded twice."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from siglip.config import ImageSpec, Limits, prefer_throughput
from siglip.images.decode import Decoded, ImageRejected
from siglip.images.decoder import Decoder, DecoderRing
from tests.support.images import encode, make_rgb

HOOK = """
import os, time
from PIL import PngImagePlugin
original = PngImagePlugin.PngImageFile.load
def load(self, *arguments):
    with open({log!r}, "a") as log:
        print(self.width, file=log)
    if self.width == 14:
        time.sleep(600)
    if self.width == 15:
        self.hoard = bytearray(4 * 2**30)
    return original(self, *arguments)
PngImagePlugin.PngImageFile.load = load
with open({log!r}, "a") as log:
    print("start", file=log)
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
        outcomes = decoder.decode([encode(make_rgb(width, 30)) for width in widths])
    finally:
        decoder.close()
    return [outcome.reason if isinstance(outcome, ImageRejected) else outcome.width for outcome in outcomes]


def test_a_hang_costs_no_second_decode_of_the_others(log: Path) -> None:
    widths = [20, 21, 14, 22]
    assert decode(widths, Limits(max_seconds=1)) == [20, 21, "decoder_timeout", 22]
    seen = [int(line) for line in log.read_text().split() if line != "start"]
    assert sorted(set(seen)) == sorted(widths)
    assert all(seen.count(width) <= seen.count(20) for width in widths), "once each"


def test_an_image_that_wants_too_much_memory_is_rejected(log: Path) -> None:
    assert decode([20, 15, 21], Limits(max_pixels=1_000_000, max_bytes=2**20)) == [20, "corrupt", 21]
    assert decode([1000], Limits(max_pixels=30_000)) == [1000], "what is allowed finds room"


def test_a_ring_of_decoders_keeps_the_order(log: Path) -> None:
    others = set(psutil.Process().children())
    ring = DecoderRing(ImageSpec(size=32), Limits(max_seconds=1))
    ring.resize(3)
    widths = [20, 14, 21, 22, 23, 24, 14, 25]
    for width in widths:
        ring.submit(encode(make_rgb(width, 30)))
    assert len(ring) == len(widths)
    assert len(set(psutil.Process().children()) - others) == 3
    pixels = np.zeros((32, 32, 3), np.uint8)
    outcomes = [ring.take(pixels) for _ in widths]
    found = [outcome.reason if isinstance(outcome, ImageRejected) else outcome.width for outcome in outcomes]
    assert found == [20, "decoder_timeout", 21, 22, 23, 24, "decoder_timeout", 25]
    assert pixels.any(), "the last one's"
    ring.submit(encode(make_rgb(20, 30)))
    ring.resize(1)
    assert len(ring) == 0
    ring.submit(encode(make_rgb(31, 30)))
    outcome = ring.take()
    assert isinstance(outcome, Decoded)
    assert outcome.width == 31, "what waited was forgotten"
    ring.close()


def test_a_rings_decoders_start_together(log: Path) -> None:
    """Each needs a second or two of imports: one after the other, sixteen would keep a GPU idle for half a minute."""
    ring = DecoderRing(ImageSpec(size=32), Limits())
    ring.resize(3)
    for width in (20, 21, 22):
        ring.submit(encode(make_rgb(width, 30)))
    outcomes = [ring.take() for _ in range(3)]
    ring.close()
    assert [isinstance(outcome, Decoded) for outcome in outcomes] == [True] * 3
    assert log.read_text().split()[:3] == ["start"] * 3, "none waited for another one's image"


def test_a_rings_decoders_may_be_ready_before_the_first_image(log: Path) -> None:
    """So a job's decoders are loaded while its model is, and not while an actor waits for their images."""
    others = set(psutil.Process().children())
    ring = DecoderRing(ImageSpec(size=32), Limits())
    ring.resize(2)
    ring.wait()
    children = set(psutil.Process().children()) - others
    loaded = [any("libtorch" in library.path for library in child.memory_maps()) for child in children]
    for width in (20, 21):
        ring.submit(encode(make_rgb(width, 30)))
    outcomes = [ring.take() for _ in range(2)]
    after = set(psutil.Process().children()) - others
    ring.close()
    assert loaded == [True, True]
    assert [isinstance(outcome, Decoded) for outcome in outcomes] == [True, True]
    assert after == children


@pytest.mark.parametrize("where", ["select.select", "_read_bytes", "Decoder._send"])
def test_an_interrupted_image_is_not_the_next_shards(where: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray interrupts the readers of a run that failed, and the same workers read for the next run."""
    ring = DecoderRing(ImageSpec(size=32), Limits())
    ring.resize(1)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    def decode_one(width: int) -> Decoded | ImageRejected:
        ring.submit(encode(make_rgb(width, 30)))
        return ring.take()

    with monkeypatch.context() as patch:
        patch.setattr(f"siglip.images.decoder.{where}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            decode_one(21)
    ring.resize(1)
    outcome = decode_one(22)
    ring.close()
    assert isinstance(outcome, Decoded)
    assert outcome.width == 22


def test_a_decoder_that_reads_no_more_is_found_out(log: Path) -> None:
    """Images larger than a socket's buffer, behind one that hangs: handing them over must not hang too."""
    decoder = Decoder(ImageSpec(size=32), Limits(max_seconds=1))
    large = encode(Image.effect_noise((1500, 1500), 100).convert("RGB"))
    assert len(large) > 3 * 2**20
    widths = ["decoder_timeout", 1500, 1500, 1500]
    outcomes = decoder.decode([encode(make_rgb(14, 30)), large, large, large])
    found = [outcome.reason if isinstance(outcome, ImageRejected) else outcome.width for outcome in outcomes]
    decoder.close()
    assert found == widths


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has the policy")
def test_a_jobs_decoders_take_no_running_ones_core() -> None:
    """On a thread of its own, whose end puts back how the tests run."""

    def start() -> int:
        prefer_throughput()
        others = {child.pid for child in psutil.Process().children()}
        decoder = Decoder(ImageSpec(size=64), Limits())
        decoder.decode([encode(make_rgb(8, 8))])
        try:
            [ours] = {child.pid for child in psutil.Process().children()} - others
            return os.sched_getscheduler(ours)
        finally:
            decoder.close()

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(start).result() == os.SCHED_BATCH
    assert os.sched_getscheduler(0) != os.SCHED_BATCH
