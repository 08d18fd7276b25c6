"""Mutated tars beside GNU tar: no image that it finds vanishes without a word, and memory stays bounded.

`SIGHTLINE_FUZZ_SECONDS=600 pytest tests/quick/pipelines/test_tar_fuzz.py` goes on for that long.
"""

from __future__ import annotations

import gzip
import itertools
import os
import random
import shutil
import subprocess
import tarfile
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipelines.inputs.rows import Row, Skipped
from pipelines.inputs.samples import split_name
from siglip.images.decode import readable_suffixes
from tests.support.tars import GNU, USTAR, V7, header, member, pad, pax, read_tar

SECONDS = float(os.environ.get("SIGHTLINE_FUZZ_SECONDS", 0))
SEED = int(os.environ.get("SIGHTLINE_FUZZ_SEED", 0))
MAX_BYTES = 20_000
SUFFIXES = (
    "jpg",
    "jpg",
    "jpg",
    "png",
    "json",
    "txt",
    "cls",
    "mp4",
    "left.jpg",
    "0.jpg",
    "05.000001.jpg",
    "05.000001.json",
)


def write_member(r: random.Random, number: int) -> bytes:
    """Return a member of any kind, with its extended headers."""
    name = f"{r.choice(['', './', 'd/e.f/', 'ü/'])}{number // 3:03}.{r.choice(SUFFIXES)}".encode()
    size = r.choice([0, 1, 100, 511, 512, 513, 3000])
    data = r.randbytes(size - min(size, 3)) + b"\1\2\3"[: min(size, 3)]
    magic = r.choice([USTAR, USTAR, GNU, V7])
    kind = r.randrange(14)
    if kind == 0:
        return pax([(b"path", b"p/" * 60 + name)]) + member(b"p/" * 50, data, magic=magic)
    if kind == 1:
        return member(b"././@LongLink", b"q/" * 60 + name + b"\0", b"L", GNU) + member(b"q/" * 50, data, magic=GNU)
    if kind == 2:
        return pax([(b"size", b"%d" % size), (b"comment", b"c" * r.randrange(2000))]) + header(name, 0) + pad(data)
    if kind == 3:
        return header(name, b"\x80" + size.to_bytes(11, "big"), magic=magic) + pad(data)
    if kind == 4:
        return header(name, 0, r.choice([b"1", b"2", b"5"]), magic, at157=b"000.jpg")
    if kind == 5:
        return member(name, r.randbytes(MAX_BYTES + 5000), magic=magic)
    return member(name, data, b"\0" if magic == V7 else b"0", magic)


def write_archive(r: random.Random, first: int) -> bytes:
    data = b"".join(write_member(r, first + number) for number in range(r.randrange(0, 14)))
    return r.choice([data + bytes(1024), pad(data + bytes(1024), 10240), pad(data + bytes(1024), 1 << 16)])


def mutate(r: random.Random, data: bytes) -> bytes:
    """Return the tar with one kind of damage, or none."""
    blocks = max(1, len(data) // 512)
    at = 512 * r.randrange(blocks)
    length = 512 * r.choice([1, 1, 2, 8, 20])
    some = bytearray(data)
    kind = r.randrange(11)
    if kind == 0:
        some[at : at + length] = bytes(len(some[at : at + length]))
    elif kind == 1:
        del some[at : at + length]
    elif kind == 2:
        some[at:at] = some[at : at + length]
    elif kind == 3:
        some[at:at] = r.choice([r.randbytes(length), bytes(length), b"text" * (length // 4)])
    elif kind == 4 and some:
        for _ in range(r.choice([1, 1, 4, 40])):
            some[r.randrange(len(some))] ^= 1 << r.randrange(8)
    elif kind == 5:
        del some[r.randrange(len(some) + 1) :]
    elif kind == 6:
        start = r.randrange(len(some) + 1)
        some[start:] = bytes(len(some) - start)
    elif kind == 7:
        some += r.choice([b"tail", bytes(700), bytes(30_000), r.randbytes(2000)])
    elif kind == 9:
        size = r.choice([b"\x80", b"\xff"]) + r.randbytes(11)
        some[at:at] = header(b"1.jpg", size, bytes([r.choice(b"0x1SgLM")]), r.choice([USTAR, GNU, V7]))
    elif kind == 8:
        del some[at + 3 : at + 7]
    return bytes(some)


def find_images(path: Path) -> list[tuple[str, int]]:
    """Return the names and sizes of the images that an independent reader finds, past zeros and damage."""
    if shutil.which("tar"):
        command = ["tar", "--ignore-zeros", "--quoting-style=literal", "--force-local", "-tvf", str(path)]
        said = subprocess.run(command, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8", "TZ": "UTC"}).stdout
        lines = [line.split(None, 5) for line in said.decode("utf-8", "replace").split("\n") if line[:1] in "-C"]
        found = [(line[5], int(line[2])) for line in lines if len(line) == 6]
    else:
        with tarfile.open(path, "r:", ignore_zeros=True, errors="surrogateescape") as archive:
            found = [(info.name, info.size) for info in archive if info.isreg()]
    return [(name, size) for name, size in found if name.lower().rpartition(".")[2] in readable_suffixes()]


def check(path: Path, data: bytes, packed: bytes) -> tuple[list[Row], Skipped]:
    """Read a tar, and compare it with what an independent reader finds in the uncompressed bytes."""
    path.write_bytes(data)
    found = find_images(path)
    rows, skipped = read_tar(path, packed, max_bytes=MAX_BYTES)
    broken = [row for row in rows if row.key == path.name]
    images = [row for row in rows if row.key != path.name]
    assert len(broken) <= 1
    if not broken:
        stems = [split_name(name.removeprefix("./"))[0] for name, _ in found]
        assert [split_name(row.key)[0] for row in images] == stems
        for row, (_, size) in zip(images, found, strict=True):
            assert len(row.data) == size if row.data is not None else size > MAX_BYTES
    return rows, skipped


def rounds(count: int) -> Iterator[tuple[int, random.Random]]:
    """Yield a seed and its generator for each round. `SIGHTLINE_FUZZ_SEED` is the first seed."""
    end = time.monotonic() + SECONDS
    for seed in itertools.count(SEED):
        if seed >= SEED + count and time.monotonic() >= end:
            print(f"{seed - SEED} rounds from seed {SEED}")
            return
        yield seed, random.Random(seed)


def test_nothing_in_a_mutated_tar_vanishes_without_a_word(tmp_path: Path) -> None:
    seen = Counter[str]()
    tracemalloc.start()
    for seed, r in rounds(60):
        parts, damages = r.choice([1, 1, 1, 2, 3]), r.choice([0, 1, 1, 2])
        data = b"".join(write_archive(r, 100 * part) for part in range(parts))
        for _ in range(damages):
            data = mutate(r, data)
        packed = data
        if r.randrange(3) == 0:
            half = r.randrange(len(data) + 1)
            packed = gzip.compress(data[:half], 1) + gzip.compress(data[half:], 1)
        try:
            rows, _ = check(tmp_path / "a.tar", data, packed)
            if not damages and parts == 1 and data.strip(b"\0"):
                assert not any(row.key == "a.tar" for row in rows), "a false alarm"
        except Exception as error:
            raise AssertionError(f"SIGHTLINE_FUZZ_SEED={seed}: {error!r}") from error
        seen.update("image" if row.data is not None else str(row.rejected and row.rejected.reason) for row in rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
    assert {"image", "too_many_bytes", "corrupt_archive", "truncated_archive"} <= set(seen)


def test_damage_within_compressed_bytes_is_a_reject_row(tmp_path: Path) -> None:
    """What is before it is read. Bytes that can be unpacked are checked as an uncompressed tar is."""
    for seed, r in rounds(60):
        packed = mutate(r, gzip.compress(write_archive(r, 0), 1, mtime=0))
        try:
            try:
                data = gzip.decompress(packed)
            except (OSError, EOFError, zlib.error):
                rows, _ = read_tar(tmp_path / "a.tar", packed, max_bytes=MAX_BYTES)
                assert not packed.strip(b"\0") or rows[-1].key == "a.tar"
            else:
                check(tmp_path / "a.tar", data, packed)
        except Exception as error:
            raise AssertionError(f"SIGHTLINE_FUZZ_SEED={seed}: {error!r}") from error
