"""Libraries for the index of `sightline index`, on clustered vectors: build, recall, latency, memory, growth.

    python -m benchmarks.index --rows 200000

The vectors imitate SigLIP's: images of 2,000 kinds, whose centres have a common direction, and as queries both images
and texts. Texts have another common direction than images, so that their cosines with images are low and close
together: an index that is good for images may be bad for texts. Recall@10 is that of the found against the ten nearest
of an exact scan. faiss-cpu and usearch are measured if they are installed. Each library runs in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from siglip.scoring import Floats, multiply

KINDS, QUERIES, GROWTH = 2_000, 100, 10_000
"""Kinds of images; queries of each sort; rows that are added at the end."""


def draw_images(rows: int, width: int, seed: int) -> Floats:
    """Draw images of all kinds, float32 (N, D) of unit norm. Frequent kinds have a hundred times as many."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(20, 20 + KINDS)
    kinds = rng.choice(KINDS, rows, p=weights / weights.sum())
    vectors = _centres(width)[kinds]
    for start in range(0, rows, 65_536):
        part = vectors[start : start + 65_536]
        part += rng.standard_normal(part.shape, np.float32) * np.float32(0.7 / np.sqrt(width))
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def draw_texts(rows: int, width: int, seed: int) -> Floats:
    """Draw texts, each about one kind of images, float32 (N, D) of unit norm."""
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(2).standard_normal(width).astype(np.float32)
    vectors = _centres(width)[rng.integers(KINDS, size=rows)] * np.float32(0.25)
    vectors += common / np.linalg.norm(common)
    vectors += rng.standard_normal(vectors.shape, np.float32) * np.float32(0.2 / np.sqrt(width))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def _centres(width: int) -> Floats:
    rng = np.random.default_rng(1)
    common = rng.standard_normal(width).astype(np.float32)
    own = rng.standard_normal((KINDS, width)).astype(np.float32)
    own *= np.float32(0.7 / np.sqrt(width))
    # Some kinds are close to each other, as in any collection.
    own += own[rng.integers(KINDS // 20, size=KINDS)]
    return np.asarray(own + 0.7 * common / np.linalg.norm(common), np.float32)


@dataclass
class Built:
    """An index: `find(query, effort)` returns the rows of the ten nearest, `add(vectors)` adds more."""

    find: Callable[[Floats, int], list[int]]
    add: Callable[[Floats], None]
    efforts: tuple[int, ...]


def build_lancedb(kind: str, vectors: Floats) -> Built:
    """Build an index of LanceDB on this disk."""
    import lancedb
    from lancedb.index import HnswSq, IvfFlat, IvfPq, IvfSq

    folder = tempfile.TemporaryDirectory()
    width = vectors.shape[1]

    def make(part: Floats, first: int) -> pa.Table:
        array = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), width)
        return pa.table({"row": np.arange(first, first + len(part)), "vector": array})

    table = lancedb.connect(folder.name).create_table("images", make(vectors, 0))
    partitions = max(1, int(np.sqrt(len(vectors))))
    if "HNSW" in kind:
        partitions = max(1, len(vectors) // 50_000)
    options: dict[str, Any] = {"distance_type": "cosine", "num_partitions": partitions}
    configs: dict[str, Any] = {
        "IVF_SQ": lambda: IvfSq(**options),
        "IVF_FLAT": lambda: IvfFlat(**options),
        "IVF_PQ": lambda: IvfPq(**options, num_sub_vectors=width // 8),
        "IVF_HNSW_SQ": lambda: HnswSq(**options),
    }
    table.create_index("vector", config=configs[kind]())

    def find(query: Floats, effort: int) -> list[int]:
        assert folder.name
        request: Any = table.search(query)
        request = request.distance_type("cosine").limit(10).select(["row", "_distance"]).refine_factor(10)
        request = request.nprobes(partitions).ef(effort) if "HNSW" in kind else request.nprobes(effort)
        return [int(row) for row in request.to_arrow()["row"].to_pylist()]

    def add(part: Floats) -> None:
        table.add(make(part, len(vectors)))
        table.optimize()

    return Built(find, add, (120, 250, 500) if "HNSW" in kind else (10, 20, 40, 80, 160))


def build_faiss(kind: str, vectors: Floats) -> Built:
    """Build an index of faiss in memory, by its description."""
    import faiss

    faiss.omp_set_num_threads(2)
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:: max(1, len(vectors) // 50_000)])
    index.add(vectors)

    def find(query: Floats, effort: int) -> list[int]:
        if "HNSW" in kind:
            index.hnsw.efSearch = effort
        else:
            index.nprobe = effort
        return [int(row) for row in index.search(query[None], 10)[1][0]]

    return Built(find, index.add, (64, 128, 256) if "HNSW" in kind else (10, 20, 40, 80, 160))


def build_usearch(kind: str, vectors: Floats) -> Built:
    """Build an index of usearch in memory, with numbers of this type."""
    from usearch.index import Index

    index = Index(ndim=vectors.shape[1], metric="cos", dtype=kind)
    index.add(np.arange(len(vectors)), vectors, threads=2)

    def find(query: Floats, effort: int) -> list[int]:
        index.expansion_search = effort
        return [int(row) for row in index.search(query, 10).keys]

    def add(part: Floats) -> None:
        index.add(np.arange(len(vectors), len(vectors) + len(part)), part, threads=2)

    return Built(find, add, (64, 128, 256))


BUILDERS = {
    "exact": (None, ""),
    "lancedb IVF_SQ": (build_lancedb, "IVF_SQ"),
    "lancedb IVF_FLAT": (build_lancedb, "IVF_FLAT"),
    "faiss IVF SQ8": (build_faiss, "IVF447,SQ8"),
    "lancedb IVF_PQ": (build_lancedb, "IVF_PQ"),
    "lancedb IVF_HNSW_SQ": (build_lancedb, "IVF_HNSW_SQ"),
    "usearch HNSW f16": (build_usearch, "f16"),
}


def measure(name: str, rows: int, width: int) -> None:
    """Measure a library, and print its lines."""
    vectors = draw_images(rows, width, 3)
    queries = {"images": draw_images(QUERIES, width, 4), "texts": draw_texts(QUERIES, width, 5)}
    right = {sort: np.sort(multiply(vectors, part), axis=0)[-10] for sort, part in queries.items()}
    build, kind = BUILDERS[name]
    if build is None:
        times = []
        for query in queries["images"][:20]:
            start = time.perf_counter()
            np.argpartition(-(vectors @ query), 10)
            times.append(time.perf_counter() - start)
        print(f"exact, in memory: p50 {np.median(times) * 1000:.0f} ms", flush=True)
        return
    process = psutil.Process()
    before = process.memory_info().rss
    start = time.perf_counter()
    try:
        built = build(kind, vectors)
    except ImportError as error:
        print(f"{name}: not installed: {error}", flush=True)
        return
    seconds = time.perf_counter() - start
    print(f"{name}: built in {seconds:.0f} s, {(process.memory_info().rss - before) >> 20:,} MiB more", flush=True)
    for effort in built.efforts:
        cells = []
        for sort, part in queries.items():
            times, hits = [], []
            for query, least in zip(part, right[sort], strict=True):
                start = time.perf_counter()
                found = built.find(query, effort)
                times.append(time.perf_counter() - start)
                hits.append(np.mean(np.pad(vectors[found] @ query >= least - 1e-6, (0, 10 - len(found)))))
            cells.append(f"{sort}: recall@10 {np.mean(hits):.3f}, p50 {np.median(times) * 1000:.1f} ms")
        print(f"{name}, effort {effort}: {'; '.join(cells)}", flush=True)
    more = draw_images(GROWTH, width, 6)
    start = time.perf_counter()
    built.add(more)
    print(f"{name}: {GROWTH:,} rows added in {time.perf_counter() - start:.1f} s", flush=True)


def main() -> None:
    """Measure all libraries, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--only", choices=list(BUILDERS), action="append")
    arguments = parser.parse_args()
    for name in arguments.only or BUILDERS:
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(name, arguments.rows, arguments.width)
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main()
