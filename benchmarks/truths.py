"""Outputs whose truth is known, in memory: for benchmarks and tests of what the curation commands say about labels."""

from __future__ import annotations

import random as rng
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.outputs import SCALE, SyntheticOutput, write_output
from curation.quality.truth import Truth
from curation.sampling.sample import Sample
from curation.tagged_output import ID, TaggedOutput, open_output, read_embeddings
from sightline.demo.shapes import LABELS, render
from siglip.checkpoint import pin_model
from siglip.config import ModelConfig
from siglip.encoder import Encoder
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale

SHARD_ROWS = 8192
PREVALENCES = (0.0005, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class MemoryOutput(TaggedOutput):
    """A finished output whose ids, keys and embeddings are in memory: it is read many times."""

    content: pa.Table

    @classmethod
    def load(cls, output: TaggedOutput) -> MemoryOutput:
        """Read an output into memory."""
        content = output.to_arrow([ID, "key", "embedding"]).combine_chunks()
        return cls(output.output, output.ledger, output.manifest, output.fingerprint, output.table, content)

    def batches(self, columns: Sequence[str], rows: int = SHARD_ROWS) -> Iterator[pa.RecordBatch]:
        """See `TaggedOutput`."""
        yield from self.content.select(list(columns)).to_batches(rows)

    def take(self, positions: Sequence[int] | NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """See `TaggedOutput`."""
        return self.content.select(list(columns)).take(pa.array(np.asarray(positions, np.int64)))


@dataclass(frozen=True)
class KnownTruth:
    """An output, and for each image (rows) and label (columns) whether the label is right, bool (N, L)."""

    output: TaggedOutput
    right: NDArray[np.bool_]

    def answer(self, wrong: float, random: np.random.Generator, *samples: Sample) -> Truth:
        """Answer all questions of some samples. A share `wrong` of the answers is flipped, at random."""
        position = np.concatenate([sample.position for sample in samples])
        label = np.concatenate([sample.label for sample in samples])
        right = self.right[position, label] ^ (random.random(len(position)) < wrong)
        positions, image = np.unique(position, return_inverse=True)
        read = self.output.take(positions, [ID, "key", "embedding"]).combine_chunks()
        embeddings = np.concatenate([read_embeddings(batch) for batch in read.select(["embedding"]).to_batches()])
        return Truth(
            positions,
            read[ID].to_pylist(),
            read["key"].to_pylist(),
            embeddings,
            image.astype(np.int64),
            label,
            right,
            np.ones(len(right)),
            designs=tuple(sample.design for sample in samples),
            source=np.repeat(1 << np.arange(len(samples)), [len(sample.position) for sample in samples]),
        )


def make_binormal(rows: int = 200_000, seed: int = 0, confusable: float = 0.004, **labels: Any) -> KnownTruth:
    """A truth of eight labels whose logits are like SigLIP's, with prevalences from 0.05 to 20 %.

    The logits of wrong images are normal with mean -9 and deviation 2, those of right images with mean -1.2 and
    deviation 1.5. A share `confusable` of the wrong images looks like right ones: the mean of their logits is -3.5.
    There are at most an eighth as many of them as right images.
    """
    random = np.random.default_rng(seed)
    right = random.random((rows, len(PREVALENCES))) < np.asarray(PREVALENCES)
    logits = np.where(right, random.normal(-1.2, 1.5, right.shape), random.normal(-9, 2, right.shape))
    share = np.minimum(confusable, np.asarray(PREVALENCES) / 8)
    similar = ~right & (random.random(right.shape) < share)
    logits[similar] = random.normal(-3.5, 1.5, int(similar.sum()))
    cosines = (logits - SCALE.logit_bias) / SCALE.logit_scale
    rest = np.sqrt(1 - np.square(cosines).sum(axis=1, keepdims=True))
    vectors = np.concatenate([cosines, rest], axis=1).astype(np.float32)
    settings = {"names": [f"label {share:.2%}" for share in PREVALENCES], "threshold": 0.1, "top_k": None, **labels}
    return _store(LabelSet.model_validate(settings), np.eye(len(PREVALENCES), vectors.shape[1]), vectors, right)


def make_rendered(images: int = 6_000, seed: int = 0) -> KnownTruth:
    """A truth of 64 labels and rendered images, with the shipped checkpoint's embeddings.

    Two in five images show one drawing, as in the checkpoint's training. Two in five are collages of four quarters, of
    which one to four have a drawing. The others show noise or a plain grey: no label is right.
    """
    random = rng.Random(seed)
    noise = np.random.default_rng(seed)
    right = np.zeros((images, len(LABELS)), bool)
    pixels = np.empty((images, 64, 64, 3), np.uint8)
    for row in range(images):
        kind = random.random()
        if kind < 0.4:
            shown = [random.randrange(len(LABELS))]
            pixels[row] = np.asarray(render(LABELS[shown[0]], random))
        elif kind < 0.8:
            shown = random.sample(range(len(LABELS)), random.randint(1, 4))
            pixels[row] = random.randint(95, 190)
            for place, label in enumerate(shown):
                y, x = 32 * (place // 2), 32 * (place % 2)
                pixels[row, y : y + 32, x : x + 32] = np.asarray(render(LABELS[label], random, (32, 32)))
        else:
            shown = []
            level, spread = random.randint(60, 200), random.choice([0, 20, 60])
            pixels[row] = np.clip(noise.normal(level, spread, (64, 64, 3)), 0, 255)
        right[row, shown] = True
    pinned = pin_model(ModelConfig(source="tiny", dtype="float32", compile=False))
    encoder = Encoder(pinned)
    vectors = np.concatenate([encoder.embed_images(part) for part in np.array_split(pixels, -(-images // 256))])
    labels = LabelSet.model_validate(
        {"names": list(LABELS), "templates": ["a photo of a {label}"], "threshold": 0.2, "top_k": None}
    )
    return _store(labels, encoder.embed_labels(labels), vectors, right, encoder.scale)


def _store(
    labels: LabelSet,
    texts: NDArray[Any],
    vectors: Floats,
    right: NDArray[np.bool_],
    scale: Scale = SCALE,
) -> KnownTruth:
    with tempfile.TemporaryDirectory() as folder:
        root = str(Path(folder) / "made")
        shards = -(-len(vectors) // SHARD_ROWS)
        made = SyntheticOutput(
            labels,
            texts.astype(np.float32),
            shards,
            lambda shard: vectors[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS],
            scale=scale,
        )
        write_output(root, made)
        return KnownTruth(MemoryOutput.load(open_output(root)), right)
