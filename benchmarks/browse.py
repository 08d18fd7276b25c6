"""The page of `sightline browse`: how long its queries take, and what it holds.

    python -m benchmarks.browse --rows 1000000

Writes an output of embeddings of 768 float32 with thumbnails of about 6 KB, unless `--output` names one, and answers
queries as the page's server does, without a browser. Texts are labels of the output, so that no model is needed: a text
that is none costs its embedding in addition.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from fastapi.testclient import TestClient
from PIL import Image

from benchmarks.outputs import SyntheticOutput, write_output
from curation.browse.app import make_app
from curation.browse.follow import Follower
from curation.browse.query import Embedder
from curation.tagged_output import open_output
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale

SHARD, WIDTH, LABELS, KINDS, PICTURES = 10_000, 768, 100, 200, 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--output", help="an output that this benchmark has written before")
    parser.add_argument("--folder", help="where files are written")
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = arguments.output or str(Path(folder) / "made")
        if arguments.output is None:
            write(root, arguments.rows)
        measure(root, Path(folder), arguments.repetitions)


def write(root: str, rows: int) -> None:
    """Write an output of images of `KINDS` kinds, half of which are labels."""
    random = np.random.default_rng(0)
    mean, kinds = random.standard_normal(WIDTH) * 1.2, random.standard_normal((KINDS, WIDTH))
    texts = normalize(0.6 * kinds[:LABELS] + 0.3 * random.standard_normal((LABELS, WIDTH)))

    def embed(shard: int) -> Floats:
        own = np.random.default_rng([1, shard])
        kind = own.integers(0, KINDS, SHARD)
        return normalize(mean + 0.6 * kinds[kind] + 0.9 * own.standard_normal((SHARD, WIDTH)))

    pictures = [draw(number) for number in range(PICTURES)]
    labels = LabelSet.model_validate({"names": [f"label {n}" for n in range(LABELS)], "threshold": 0.3, "top_k": 3})
    made = SyntheticOutput(
        labels, texts, rows // SHARD, embed, scale=Scale(40, -12), thumbnail=lambda row: pictures[row % PICTURES]
    )
    write_output(root, made)


def normalize(vectors: np.ndarray) -> Floats:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def draw(number: int) -> bytes:
    random = np.random.default_rng(number)
    width, height = [(256, 192), (192, 256), (256, 256), (256, 144)][number % 4]
    coarse = np.kron(random.integers(0, 256, (4, 4, 3)), np.ones((64, 64, 1)))[:height, :width]
    pixels = np.clip(coarse + random.integers(-25, 25, (height, width, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


def measure(root: str, folder: Path, repetitions: int) -> None:
    begun = time.perf_counter()
    follower = Follower(open_output(root), folder, tell=lambda line: None)
    follower.start()
    print(f"first images after    {time.perf_counter() - begun:8.2f} s")
    while follower.state.complete is None:
        time.sleep(0.05)
    rows = follower.snapshot.rows
    print(f"{rows:,} rows copied in {time.perf_counter() - begun:6.1f} s")
    with TestClient(make_app(follower, Embedder(None), folder / "answers.jsonl")) as client:
        client.headers["host"] = "localhost"
        run = client.get("/api/about").json()["run"]
        queries: dict[str, Callable[[int], dict[str, object]]] = {
            "no query": lambda n: {},
            "a text": lambda n: {"texts": [f"label {n}"], "order": "best"},
            "a text, all images": lambda n: {"texts": [f"label {n}"], "cutoff": "none"},
            "a text and an unwanted one": lambda n: {"texts": [f"label {n}"], "without": [f"label {n + 20}"]},
            "an image's neighbours": lambda n: {"like": [n * 997]},
            "neighbours, folded": lambda n: {"like": [n * 997], "fold": True},
            "a label by its score": lambda n: {"labels": [{"label": f"label {n}", "min": 0.5}]},
            "a condition in SQL": lambda n: {"where": f"width > {n}"},
        }
        for name, query in queries.items():
            seconds = []
            for number in range(1, repetitions + 1):
                begun = time.perf_counter()
                response = client.post(f"/api/search/{run}", json=query(number))
                seconds.append(time.perf_counter() - begun)
                assert response.status_code == 200, response.text
            print(f"{name:28} p50 {1000 * np.median(seconds):7.0f} ms   max {1000 * max(seconds):7.0f} ms")
        positions = np.random.default_rng(0).integers(0, rows, 60).tolist()
        begun = time.perf_counter()
        for position in positions:
            client.get(f"/api/thumbnail/{run}/{position}")
        print(f"{'60 thumbnails':28}     {1000 * (time.perf_counter() - begun):7.0f} ms")
    memory = psutil.Process().memory_full_info()
    print(f"memory: {(memory.rss - memory.shared) / 1e6:,.0f} MB, and {memory.shared / 1e9:.1f} GB of mapped files")
    follower.close()


if __name__ == "__main__":
    main()
