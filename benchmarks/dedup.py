"""Copies among many images: time and memory, and how many are found.

    python -m benchmarks.dedup speed --rows 200000 1000000      embeddings in groups of similar ones, no thumbnails
    python -m benchmarks.dedup copies --pictures 100000         different pictures with planted copies of 1,000 of them

`copies` has pictures in scenes of ten, whose embeddings have a cosine of about 0.9, so that all of them have to be told
apart by their thumbnails.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.outputs import SyntheticOutput, write_output
from curation.dedup.result import dedup_output
from curation.tagged_output import open_output
from siglip.labels import LabelSet
from siglip.scoring import Floats
from tests.support.pictures import COPIES, draw_picture, encode_jpeg

LABELS = LabelSet.model_validate({"names": ["cat", "dog"], "threshold": 0.5})
PER_SHARD = 10_000
PLANTED = 1000


def draw_scenes(rows: int, width: int, seed: int, each: int = 10, cosine: float = 0.9) -> Floats:
    """Draw embeddings in scenes of `each`, whose cosine with each other is about `cosine`: float32 (N, D)."""
    rng = np.random.default_rng(seed)
    scenes = rng.standard_normal((-(-rows // each), width), np.float32).repeat(each, axis=0)[:rows]
    own = rng.standard_normal((rows, width), np.float32)
    vectors = np.sqrt(cosine) * scenes + np.sqrt(1 - cosine) * own
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def measure_speed(rows: int, width: int, folder: str | None) -> Iterator[str]:
    """Yield the time of a run over a synthetic output, and its memory."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        made = SyntheticOutput(
            LABELS,
            draw_scenes(2, width, 0),
            -(-rows // PER_SHARD),
            lambda shard: draw_scenes(min(PER_SHARD, rows - shard * PER_SHARD), width, shard),
            dtype="float16",
        )
        write_output(f"{root}/tags", made)
        output = open_output(f"{root}/tags")
        start = time.perf_counter()
        done = dedup_output(output, Path(root) / "result", similar=0.88)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        speed = f"{seconds:.0f} s, {rows / seconds:,.0f} rows/s"
        yield f"{rows:,} rows: {speed}, peak {peak:,} MiB, {done.similar:,} similar"


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


def main() -> None:
    """Run a benchmark, and print its lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("speed")
    speed.add_argument("--rows", type=int, nargs="+", default=[200_000, 1_000_000])
    copies = commands.add_parser("copies")
    copies.add_argument("--pictures", type=int, default=100_000)
    for command in (speed, copies):
        command.add_argument("--width", type=int, default=768)
        command.add_argument("--folder")
    arguments = parser.parse_args()
    if arguments.command == "copies":
        lines = measure_copies(arguments.pictures, arguments.width, arguments.folder)
    else:
        lines = (line for rows in arguments.rows for line in measure_speed(rows, arguments.width, arguments.folder))
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
