"""Search in an output: where the results end, and how fast a scan is.

    python -m benchmarks.search cutoff                     the cut-off beside the best fixed one, on held-out images
    python -m benchmarks.search speed --rows 1000000       one exact scan, beside reading the embeddings alone

`cutoff` renders images, blurs some of them so that their scores run low, and makes collections in which a quarter of
the 64 concepts are absent and the others have 1 to 100 images. The fixed cut-offs are cosines that are the same for all
queries, chosen with hindsight on the very collections that they are judged on.
"""

from __future__ import annotations

import argparse
import io
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from benchmarks.outputs import SyntheticOutput, write_output
from curation.search.cutoff import TINY_SHARE, LogitCounts
from curation.search.query import Query
from curation.search.search import search_output
from curation.tagged_output import open_output, read_embeddings
from sightline.demo.dataset import encode_image
from sightline.demo.shapes import LABELS
from sightline.encoder import Encoder
from siglip.labels import LabelSet
from siglip.scoring import Floats

FREQUENCIES = (1, 3, 10, 30, 100)
"""Images of a concept that is present."""

Choice = Callable[[NDArray[np.float64]], NDArray[np.bool_]]


@dataclass
class Judged:
    """What a rule for the cut-off did: shares of queries and of images.

    `empty` has for each query of an absent concept whether it found nothing; `recalls` and `precisions` are of the
    queries of present concepts, by the number of their images.
    """

    empty: list[bool] = field(default_factory=list)
    recalls: dict[int, list[float]] = field(default_factory=dict)
    precisions: list[float] = field(default_factory=list)

    @property
    def nothing(self) -> float:
        """The share of absent concepts for which nothing was found."""
        return float(np.mean(self.empty))

    @property
    def recall(self) -> float:
        """The share of the right images that were found, averaged over the queries of present concepts."""
        return float(np.mean([one for recalls in self.recalls.values() for one in recalls]))

    def describe(self) -> str:
        """Return the figures as cells of a table."""
        by_count = "  ".join(f"{np.mean(self.recalls[count]):.0%}" for count in FREQUENCIES)
        return f"{self.nothing:7.1%}  {self.recall:7.1%}  {np.mean(self.precisions):7.1%}   {by_count}"


def render_images(each: int, blur: float, seed: int) -> tuple[list[bytes], NDArray[np.int64]]:
    """Render `each` images of each concept, a third of them blurred. Returns PNG files, and concepts, int64 (N,)."""
    rng = random.Random(seed)
    images, concepts = [], []
    for number in range(each * len(LABELS)):
        concept = number % len(LABELS)
        data = encode_image(rng, LABELS[concept])
        if blur and number // len(LABELS) % 3 == 0:
            with Image.open(io.BytesIO(data)) as image:
                radius = blur * min(image.size) / 64 * rng.random()
                buffer = io.BytesIO()
                image.convert("RGB").filter(ImageFilter.GaussianBlur(radius)).save(buffer, "PNG")
            data = buffer.getvalue()
        images.append(data)
        concepts.append(concept)
    return images, np.array(concepts)


def draw_collections(
    concepts: NDArray[np.int64], count: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], list[int]]]:
    """Yield collections: the indices of their images, and the number of images of each concept."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        frequencies = rng.choice(FREQUENCIES, len(LABELS))
        frequencies[rng.choice(len(LABELS), len(LABELS) // 4, replace=False)] = 0
        chosen = [
            rng.choice(np.flatnonzero(concepts == concept), number, replace=False)
            for concept, number in enumerate(frequencies)
        ]
        yield np.concatenate(chosen), frequencies.tolist()


def judge(logits: Floats, concepts: NDArray[np.int64], choose: Choice, collections: int, seed: int) -> Judged:
    """Apply a rule to the queries of all concepts in some collections."""
    judged = Judged()
    for chosen, frequencies in draw_collections(concepts, collections, seed):
        for concept, number in enumerate(frequencies):
            found = choose(logits[chosen, concept].astype(np.float64))
            right = concepts[chosen] == concept
            if not number:
                judged.empty.append(not found.any())
                continue
            hits = int((found & right).sum())
            judged.recalls.setdefault(number, []).append(hits / number)
            judged.precisions.append(hits / max(1, int(found.sum())))
    return judged


def choose_auto(logits: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The cut-off that `sightline search` uses."""
    counts = LogitCounts()
    counts.add(logits)
    return logits > counts.find_cutoff(TINY_SHARE)


def make_fixed(limit: float) -> Choice:
    """Return the rule with the same cut-off for all queries."""
    return lambda logits: logits > limit


def measure_cutoff(each: int, collections: int) -> Iterator[str]:
    """Yield the lines of the table."""
    encoder = Encoder.load("tiny")
    yield "images     cut-off                 nothing   recall  precision  recall of 1, 3, 10, 30, 100 images"
    for name, blur in (("sharp", 0.0), ("blurred", 4.0)):
        images, concepts = render_images(each, blur, seed=7)
        head = encoder.head(list(LABELS))
        logits = head.logits(encoder.images(images))
        auto = judge(logits, concepts, choose_auto, collections, seed=1)
        yield f"{name:10} auto                    {auto.describe()}"
        gain, offset = float(head.gain[0]), float(head.offset[0])
        fixed = {
            cosine: judge(logits, concepts, make_fixed(gain * cosine + offset), collections, seed=1)
            for cosine in np.arange(0.2, 0.46, 0.01).round(2).tolist()
        }
        same = [cosine for cosine, judged in fixed.items() if judged.nothing >= auto.nothing]
        for title, cosine in (
            ("as often nothing", max(same, key=lambda one: fixed[one].recall)),
            ("as much recall", max(fixed, key=lambda one: (fixed[one].recall >= auto.recall, fixed[one].nothing))),
        ):
            yield f"{name:10} {cosine:.2f}, {title:17} {fixed[cosine].describe()}"


def measure_speed(rows: int, width: int, dtype: str, folder: str | None) -> Iterator[str]:
    """Yield the time of an exact search over a synthetic output, and of reading its embeddings alone."""
    per_shard = 10_000

    def embed(shard: int) -> Floats:
        vectors = np.random.default_rng(shard).standard_normal(
            (min(per_shard, rows - shard * per_shard), width), np.float32
        )
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    labels = LabelSet.model_validate({"names": ["cat", "dog", "bird"], "threshold": 0.5})
    with tempfile.TemporaryDirectory(dir=folder) as root:
        write_output(root, SyntheticOutput(labels, embed(0)[:3], -(-rows // per_shard), embed, dtype=dtype))
        output = open_output(root)
        process = psutil.Process()
        for name in ("the first time", "again"):
            start = time.perf_counter()
            for batch in output.batches(["embedding"]):
                read_embeddings(batch)
            reading = time.perf_counter() - start
            for title, query in (
                ("a text", Query(["cat"])),
                ("a text, an example, an unwanted text", Query(["cat"], without=["dog"], like=["image 00000005"])),
                ("a text and a condition", Query(["cat"], where="key like '%7'")),
            ):
                start = time.perf_counter()
                search_output(output, query)
                seconds = time.perf_counter() - start
                yield (
                    f"{name}: {title}: {seconds:.1f} s, {rows / seconds:,.0f} rows/s; reading alone {reading:.1f} s; "
                    f"{process.memory_info().rss >> 20} MiB"
                )


def main() -> None:
    """Run a benchmark, and print its lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    cutoff = commands.add_parser("cutoff")
    cutoff.add_argument("--each", type=int, default=150, help="Images of each concept.")
    cutoff.add_argument("--collections", type=int, default=40)
    speed = commands.add_parser("speed")
    speed.add_argument("--rows", type=int, default=1_000_000)
    speed.add_argument("--width", type=int, default=768)
    speed.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    speed.add_argument("--folder")
    arguments = parser.parse_args()
    lines = (
        measure_cutoff(arguments.each, arguments.collections)
        if arguments.command == "cutoff"
        else measure_speed(arguments.rows, arguments.width, arguments.dtype, arguments.folder)
    )
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
