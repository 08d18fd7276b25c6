"""Copies among many images: time and memory, and how many are found.

    python -m benchmarks.dedup speed --rows 200000 1000000      embeddings in groups of similar ones, no thumbnails
    python -m benchmarks.dedup speed --rows 1000000 --share 0.2 --identical --later 10000
    python -m benchmarks.dedup cells --rows 100000 1000000      how many close pairs share a cell
    python -m benchmarks.dedup copies --pictures 100000         different pictures with planted copies of 1,000 of them

`copies` has pictures in scenes of ten, whose embeddings have a cosine of about 0.9, so that all of them have to be told
apart by their thumbnails.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.outputs import SyntheticOutput, write_output
from curation.dedup.cells import CELL_ROWS, NEAREST, fit_cells
from curation.dedup.result import dedup_output
from curation.tagged_output import TaggedOutput, open_output
from siglip.labels import LabelSet
from siglip.scoring import Floats
from tests.support.pictures import COPIES, draw_picture, encode_jpeg

LABELS = LabelSet.model_validate({"names": ["cat", "dog"], "threshold": 0.5})
PER_SHARD = 10_000
PLANTED = 1000


def draw_scenes(rows: int, width: int, seed: int, each: int = 10, cosine: float = 0.9, share: float = 1) -> Floats:
    """Draw embeddings in scenes of `each`, whose cosine with each other is about `cosine`: float32 (N, D).

    Only a `share` of the rows are in scenes; the others have random directions.
    """
    rng = np.random.default_rng(seed)
    scenes = rng.standard_normal((-(-rows // each), width), np.float32).repeat(each, axis=0)[:rows]
    own = rng.standard_normal((rows, width), np.float32)
    cosines = np.where(np.arange(rows) < round(share * rows), cosine, 0).astype(np.float32)[:, None]
    vectors = np.sqrt(cosines) * scenes + np.sqrt(1 - cosines) * own
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@dataclass
class Peaks:
    """The largest memory and temporary folder that `watch` has seen, in MiB. `anonymous` has no pages of files."""

    resident: float = 0
    anonymous: float = 0
    folder: float = 0


@contextmanager
def watch(folder: Path) -> Iterator[Peaks]:
    """Look at this process's memory and at the hidden folders in `folder` ten times a second."""
    peaks, process, ended = Peaks(), psutil.Process(), threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            memory = process.memory_info()
            blocks = 0
            for path in folder.glob(".*/*"):
                with suppress(FileNotFoundError):
                    blocks += path.stat().st_blocks
            peaks.resident = max(peaks.resident, memory.rss / 2**20)
            peaks.anonymous = max(peaks.anonymous, (memory.rss - memory.shared) / 2**20)
            peaks.folder = max(peaks.folder, blocks / 2**11)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def measure_speed(arguments: argparse.Namespace, rows: int) -> Iterator[str]:
    """Yield the time of a run over a synthetic output, its memory and its temporary files; then of a later run.

    The earlier result that the later run continues has all rows but `arguments.later`.
    """
    cosine = arguments.similar + 0.02
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        made = SyntheticOutput(
            LABELS,
            draw_scenes(2, arguments.width, 0),
            -(-rows // PER_SHARD),
            lambda shard: draw_scenes(
                min(PER_SHARD, rows - shard * PER_SHARD), arguments.width, shard, cosine=cosine, share=arguments.share
            ),
            dtype="float16",
            # A tenth of the rows has the bytes of the row before.
            digest=lambda row: str(row - (row % 10 == 9)) if arguments.identical else str(row),
        )
        write_output(f"{root}/tags", made)
        output = open_output(f"{root}/tags")
        result = Path(root) / "result"
        yield f"{rows:,} rows: {_measure(output, result, arguments.similar)}"
        if arguments.later:
            _forget(result, rows - arguments.later)
            yield f"{rows:,} rows, {arguments.later:,} of them new: {_measure(output, result, arguments.similar)}"


def _measure(output: TaggedOutput, result: Path, similar: float) -> str:
    start, cpu = time.perf_counter(), time.process_time()
    with watch(result.parent) as peaks:
        done = dedup_output(output, result, similar=similar)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return (
        f"{seconds:.0f} s, {cpu:.0f} s of CPU time, {output.rows / cpu:,.0f} rows/s of CPU time; "
        f"peak {peaks.resident:,.0f} MiB, {peaks.anonymous:,.0f} MiB without pages of files; "
        f"temporary files {peaks.folder:,.0f} MiB; {done.identical:,} identical, {done.similar:,} similar"
    )


def _forget(result: Path, rows: int) -> None:
    """Leave only the first `rows` rows of a result, in whole shards, as if an earlier run had written it."""
    first = -(-rows // PER_SHARD)
    ids = (result / "keep.txt").read_text().splitlines()
    early = [id_ for id_ in ids if int(id_[7:13]) < first]
    (result / "keep.txt").write_text("".join(f"{id_}\n" for id_ in early))
    groups = pq.read_table(result / "groups.parquet")
    shards = pc.cast(pc.utf8_slice_codeunits(groups["id"], 7, 13), pa.int32())
    pq.write_table(groups.filter(pc.less(shards, first)), result / "groups.parquet")


def _draw_shard(numbers: tuple[int, int]) -> list[bytes]:
    rng = np.random.default_rng(numbers[0])
    return [encode_jpeg(draw_picture(rng)) for _ in range(*numbers)]


def measure_copies(pictures: int, width: int, folder: str | None) -> Iterator[str]:
    """Yield how many planted copies were found, and how many different pictures were taken for copies."""
    ranges = [(start, min(start + PER_SHARD, pictures)) for start in range(0, pictures, PER_SHARD)]
    with ProcessPoolExecutor(2) as pool:
        thumbnails = [one for shard in pool.map(_draw_shard, ranges) for one in shard]
    vectors = draw_scenes(pictures, width, 1)
    rng = np.random.default_rng(2)
    kinds = list(COPIES)
    planted: dict[str, str] = {}
    keys = [f"photo {number}" for number in range(pictures)]
    copies = []
    first = np.random.default_rng(0)
    for number in range(min(PLANTED, pictures)):
        picture = draw_picture(first)  # the pictures of the first shard once more
        kind = kinds[number % len(kinds)]
        thumbnails.append(encode_jpeg(COPIES[kind](picture, rng)))
        keys.append(f"{kind} {number}")
        planted[keys[-1]] = keys[number]
        copies.append(0.97 * vectors[number] + np.sqrt(1 - 0.97**2) * draw_scenes(1, width, 10 + number)[0])
    together = np.concatenate([vectors, np.asarray(copies, np.float32)])
    together /= np.linalg.norm(together, axis=1, keepdims=True)
    shards = -(-len(together) // PER_SHARD)
    with tempfile.TemporaryDirectory(dir=folder) as root:
        made = SyntheticOutput(
            LABELS,
            vectors[:2],
            shards,
            lambda shard: together[shard * PER_SHARD : (shard + 1) * PER_SHARD],
            key=keys.__getitem__,
            thumbnail=thumbnails.__getitem__,
        )
        write_output(f"{root}/tags", made)
        start = time.perf_counter()
        done = dedup_output(open_output(f"{root}/tags"), Path(root) / "result")
        seconds = time.perf_counter() - start
        rows = pq.read_table(Path(root) / "result/groups.parquet", filters=[("kind", "=", "copy")]).to_pylist()
        groups: dict[str, set[str]] = {}
        for row in rows:
            groups.setdefault(row["group"], set()).add(row["key"])
        right = sum(any({copy, original} <= keys for keys in groups.values()) for copy, original in planted.items())
        wrong = sum(len([key for key in keys if key.startswith("photo")]) - 1 for keys in groups.values())
        yield (
            f"{done.rows:,} images in {seconds:.0f} s: {right} of {len(planted)} planted copies found, {wrong} of "
            f"{pictures:,} different pictures taken for a copy"
        )


def measure_cells(rows: int, width: int, pairs: int = 4000) -> Iterator[str]:
    """Yield how many pairs of random vectors share a cell, of those that so many rows would have."""
    number = -(-rows // CELL_ROWS)
    sample = draw_scenes(min(rows, 300_000), width, 1, share=0)
    cells = fit_cells(np.arange(len(sample)), sample, number)
    ones, others = draw_scenes(pairs, width, 2, share=0), draw_scenes(pairs, width, 3, share=0)
    others -= ones * (ones * others).sum(axis=1, keepdims=True)
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    nearest = cells.assign(ones, NEAREST)
    for cosine in (0.85, 0.9, 0.95, 0.98):
        theirs = cells.assign(cosine * ones + np.sqrt(np.float32(1 - cosine**2)) * others, NEAREST)
        shared = (nearest[:, :, None] == theirs[:, None]).any(axis=(1, 2)).mean()
        yield f"{rows:,} rows, {len(cells)} cells: {shared:.1%} of the pairs with a cosine of {cosine} share one"


def main() -> None:
    """Run a benchmark, and print its lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("speed")
    speed.add_argument("--rows", type=int, nargs="+", default=[200_000, 1_000_000])
    speed.add_argument("--share", type=float, default=1, help="share of the rows that are in scenes of ten")
    speed.add_argument("--identical", action="store_true", help="a tenth of the rows has the bytes of another one")
    speed.add_argument("--similar", type=float, default=0.88)
    speed.add_argument("--later", type=int, default=0, help="then a run in which so many rows are new")
    cells = commands.add_parser("cells")
    cells.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    copies = commands.add_parser("copies")
    copies.add_argument("--pictures", type=int, default=100_000)
    for command in (speed, cells, copies):
        command.add_argument("--width", type=int, default=768)
        command.add_argument("--folder")
    arguments = parser.parse_args()
    if arguments.command == "copies":
        lines = measure_copies(arguments.pictures, arguments.width, arguments.folder)
    elif arguments.command == "cells":
        lines = (line for rows in arguments.rows for line in measure_cells(rows, arguments.width))
    else:
        lines = (line for rows in arguments.rows for line in measure_speed(arguments, rows))
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
