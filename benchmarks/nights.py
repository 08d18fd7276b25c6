"""The index of an output that grows by a night's images: time, memory and recall, beside an exact search.

    python -m benchmarks.nights --rows 2000000 --nights 10

The images and texts are those of `benchmarks.index`, of 2,000 kinds, in float16. Each night adds 10,000 images, and
`sightline index` is run. Recall is what it measures on the output's own images and labels. The latencies are medians of
searches with the output opened and the vectors of texts at hand, with `--index` and without.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from benchmarks.index import draw_images, draw_texts
from benchmarks.outputs import SyntheticOutput, grow_output, write_output
from curation.index.build import build_index
from curation.index.search import search_index
from curation.search.query import Query
from curation.search.search import Results, search_output
from curation.tagged_output import TaggedOutput, open_output
from siglip.labels import LabelSet
from siglip.scoring import Scale

WIDTH, SHARD, NIGHT, LABELS = 768, 10_000, 10_000, 100
SCALE = Scale(117.33, -29.0)
"""A bias with which few of the drawn images are relevant to a drawn text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--nights", type=int, default=10)
    parser.add_argument("--searches", type=int, default=20)
    parser.add_argument("--exact", type=int, default=3, help="exact searches, which take long")
    parser.add_argument("--folder", help="where files are written: 4 KB for each row")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = str(Path(folder) / "made")
        made = SyntheticOutput(
            LabelSet.model_validate({"names": [f"label {n}" for n in range(LABELS)], "threshold": 0.5, "top_k": 3}),
            draw_texts(LABELS, WIDTH, 5),
            arguments.rows // SHARD,
            lambda shard: draw_images(SHARD if shard < arguments.rows // SHARD else NIGHT, WIDTH, 100 + shard),
            dtype="float16",
            scale=SCALE,
        )
        write_output(root, made)
        print(f"{arguments.rows:,} rows", flush=True)
        build("first", root)
        measure(root, arguments.searches, arguments.exact)
        for night in range(arguments.nights):
            grown = replace(made, shards=made.shards + night + 1)
            grow_output(root, grown, made.shards + night)
            build(f"night {night + 1}", root)
        measure(root, arguments.searches, 0)


def build(name: str, root: str) -> None:
    begun = time.perf_counter()
    built = build_index(open_output(root))
    seconds, memory = time.perf_counter() - begun, psutil.Process().memory_info()
    why = f", trained: {built.trained}" if built.trained else ""
    print(
        f"{name:9} {built.rows:10,} rows  {seconds:7.1f} s  recall@10 images {built.recall_images:.3f}, texts "
        f"{built.recall_texts:.3f}, {built.probes} partitions, {(memory.rss - memory.shared) / 2**20:,.0f} MiB{why}",
        flush=True,
    )


def measure(root: str, searches: int, exact: int) -> None:
    output = open_output(root)
    queries: dict[str, Callable[[int], Query]] = {
        "a text": lambda n: Query([f"label {n}"]),
        "like an image": lambda n: Query(like=[f"000000-000000/{n}"]),
    }
    for name, query in queries.items():
        for kind, search, count in (("index", search_index, searches), ("exact", search_output, exact)):
            if count:
                seconds = [time_search(search, output, query(number)) for number in range(count)]
                print(f"{name:14} {kind}  p50 {np.median(seconds):8.3f} s", flush=True)


def time_search(search: Callable[[TaggedOutput, Query], Results], output: TaggedOutput, query: Query) -> float:
    begun = time.perf_counter()
    search(output, query)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
