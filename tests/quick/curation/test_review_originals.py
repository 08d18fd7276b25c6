"""Larger pictures of a sample: found by digest in files and archives, bounded, and never of another image."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.review import originals as module
from curation.review.originals import CACHE_BYTES, NoPicture, Originals
from pipelines.inputs.formats import Archive
from siglip.config import ImageSpec, Limits
from siglip.images.decoder import Decoder
from storage.store import StoreOptions
from tests.support.samples import make_sample

SECONDS = 60


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    """Keep the decoder server for all tests of this file: its imports take seconds."""
    decoder = Decoder(ImageSpec(size=16), Limits())
    decoder.start()
    yield
    decoder.close()


def draw(shade: int, size: tuple[int, int] = (60, 40), format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, format)
    return buffer.getvalue()


@contextmanager
def originals(images: Sequence[tuple[Path, bytes]], cache_bytes: int = CACHE_BYTES) -> Iterator[Originals]:
    sources = [(str(source), hashlib.sha256(data).hexdigest()) for source, data in images]
    sample = make_sample(["cat"] * len(images), sources=sources)
    with closing(Originals(sample, StoreOptions(), cache_bytes=cache_bytes)) as made:
        yield made


def look(picture: bytes) -> tuple[tuple[int, int], int]:
    """Return a JPEG's size and the brightness of its middle."""
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "JPEG"
        return image.size, image.convert("L").getpixel((image.width // 2, image.height // 2))  # type: ignore[return-value]


def why(made: Originals, row: int) -> str:
    with pytest.raises(NoPicture) as caught:
        made.request(row).result(SECONDS)
    return str(caught.value)


def test_files_are_shrunk_to_1280_pixels_and_never_enlarged(tmp_path: Path) -> None:
    images = [(tmp_path / "large.jpg", draw(50, (3000, 1500), "JPEG")), (tmp_path / "small.png", draw(200))]
    for path, data in images:
        path.write_bytes(data)
    with originals(images) as made:
        assert look(made.request(0).result(SECONDS)) == ((1280, 640), 50)
        assert look(made.request(1).result(SECONDS)) == ((60, 40), 200)


def test_images_in_a_tar_are_found_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "images.tar"
    data = [draw(10 * shade) for shade in range(8)]
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(data):
            for copy in ("a", "b"):  # two members may have the same name up to the dot, or the same bytes
                info = tarfile.TarInfo(f"{copy}/{number}.png")
                info.size = len(image)
                tar.addfile(info, io.BytesIO(image))
    passes = []
    scan = Originals._scan

    def count(self: Originals, source: str, archive: Archive, wanted: set[str]) -> bool:
        passes.append(source)
        return scan(self, source, archive, wanted)

    monkeypatch.setattr(Originals, "_scan", count)
    with originals([(path, data[row]) for row in (5, 2, 7)]) as made:
        assert [look(made.request(row).result(SECONDS))[1] for row in (1, 0, 2)] == [20, 50, 70]
    assert len(passes) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_images_in_a_parquet_file_are_found(tmp_path: Path, nested: bool) -> None:
    path = tmp_path / "images.parquet"
    data = [draw(10 * shade) for shade in range(8)]
    values = [{"bytes": image, "path": None} for image in data] if nested else data
    pq.write_table(pa.table({"caption": ["x"] * 8, "image": values}), path, row_group_size=3)
    with originals([(path, data[row]) for row in (6, 1)]) as made:
        assert [look(made.request(row).result(SECONDS))[1] for row in (0, 1)] == [60, 10]


def test_there_is_no_picture_of_another_image_than_the_tagged_one(tmp_path: Path) -> None:
    path, tar = tmp_path / "a.png", tmp_path / "a.tar"
    path.write_bytes(draw(1))
    with tarfile.open(tar, "w") as file:
        file.add(path, "a.png")
    gone = tmp_path / "gone.png"
    broken = tmp_path / "broken.png"
    broken.write_bytes(draw(3)[:60])
    images = [
        (path, draw(2)),
        (tar, draw(2)),
        (gone, draw(2)),
        (tmp_path / "gone.tar", draw(2)),
        (broken, draw(3)[:60]),
    ]
    with originals(images) as made:
        assert "is not the file that was tagged" in why(made, 0)
        assert "the image is not in" in why(made, 1)
        assert "is not there" in why(made, 2)
        assert "is not there" in why(made, 3)
        assert "truncated" in why(made, 4)


def test_the_pictures_that_are_kept_are_bounded_in_bytes(tmp_path: Path) -> None:
    images = [(tmp_path / f"{shade}.png", draw(shade, (200, 200))) for shade in range(6)]
    for path, data in images:
        path.write_bytes(data)
    with originals(images, cache_bytes=3000) as made:
        sizes = [len(made.request(row).result(SECONDS)) for row in range(6)]
        assert sum(sizes) > 3000
        assert 0 < made._held <= 3000
        assert made._held == sum(map(len, made._kept.values()))
        assert look(made.request(0).result(SECONDS))[1] == 0  # read again


def test_a_scan_of_a_long_archive_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        for shade in range(20):
            image = draw(shade)
            info = tarfile.TarInfo(f"{shade}.png")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    monkeypatch.setattr(module, "SCAN_BYTES", 5 * len(draw(0)))
    with originals([(path, draw(19)), (path, draw(1))]) as made:
        assert "far behind" in why(made, 0)
        assert look(made.request(1).result(SECONDS))[1] == 1  # it was found on the way


def test_a_decoder_that_dies_costs_at_most_one_picture(tmp_path: Path) -> None:
    images = [(tmp_path / f"{shade}.png", draw(shade)) for shade in (10, 20)]
    for path, data in images:
        path.write_bytes(data)
    with originals(images) as made:
        made.request(0).result(SECONDS)
        pid = made._decoder.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert look(made.request(1).result(SECONDS))[1] == 20
