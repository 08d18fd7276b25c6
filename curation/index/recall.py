"""The recall of an index: how many of the nearest images searches find, measured against all images of the output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curation.index.labels import RowLabels, number_labels
from curation.index.state import list_shards
from curation.index.table import IndexTable, name_shard, number_shard
from curation.tagged_output import TaggedOutput, read_embeddings
from siglip.scoring import Floats, multiply

NEAREST = 10
QUERIES = 100
"""Images, and prompts of labels, that are searched for."""
SAMPLE = 16_384
"""Embeddings in the sample, 25 MB with 768 dimensions."""
ENOUGH = 0.95
"""The vector index is trained anew when less of the nearest images are found."""
AIM = 0.97
"""What a new vector index has to find, so that some growth changes nothing."""
FEWEST_PROBES = 20
_EQUAL = 1e-6


@dataclass(frozen=True)
class Truth:
    """What an exact scan found: queries with the cosines of their tenth nearest images.

    `images` and `texts` are float32 (Q, D) of unit norm, `least_images` and `least_texts` float32 (Q,). `sample` and
    what belongs to it are those of `curation.index.state.IndexState`.
    """

    images: Floats
    texts: Floats
    least_images: Floats
    least_texts: Floats
    sample: NDArray[np.float16]
    sample_shards: NDArray[np.int64]
    sample_labels: RowLabels


def scan_truth(output: TaggedOutput, seed: int) -> Truth:
    """Read all embeddings once: find the nearest images of some queries, and draw the sample.

    The queries are images of the output, drawn at random, and the prompts of its labels, at most `QUERIES` of each. An
    image is not counted among its own nearest. Memory holds a batch, the queries and the sample.
    """
    rng = np.random.default_rng(seed)
    shards = list_shards(output)
    rows = sum(count for _, count in shards.values())
    places = np.sort(rng.choice(rows, min(QUERIES, rows), replace=False))
    images = read_embeddings(output.take(places, ["embedding"]))
    texts = output.head.vectors
    if len(texts) > QUERIES:
        texts = texts[np.sort(rng.choice(len(texts), QUERIES, replace=False))]
    drawn = np.sort(rng.choice(rows, min(SAMPLE, rows), replace=False))
    queries = np.concatenate([images, texts])
    best = np.full((NEAREST + 1, len(queries)), -np.inf, np.float32)
    sample, sample_shards, sample_labels, names = [], [], [], number_labels(output)
    for shard, first, batch in output.shard_batches({name_shard(one) for one in shards}, ["embedding", "labels"]):
        embeddings = read_embeddings(batch)
        best = np.sort(np.concatenate([best, multiply(embeddings, queries)]), axis=0)[-NEAREST - 1 :]
        inside = drawn[np.searchsorted(drawn, first) : np.searchsorted(drawn, first + len(batch))] - first
        sample.append(embeddings[inside].astype(np.float16))
        sample_labels.append(RowLabels.read(batch["labels"].take(pa.array(inside)), names))
        sample_shards.append(np.full(len(inside), number_shard(shard), np.int64))
    return Truth(
        images,
        texts,
        best[0, : len(images)],
        best[1, len(images) :],
        np.concatenate(sample),
        np.concatenate(sample_shards),
        RowLabels.join(sample_labels),
    )


def measure_recall(table: IndexTable, truth: Truth, probes: int) -> tuple[float, float]:
    """Return the shares of the nearest images that are found, for images and for texts.

    What is as near as the tenth nearest counts as found, so that of many copies any ten will do.
    """
    images = [
        (_count(table, query, least, NEAREST + 1, probes) - 1) / NEAREST
        for query, least in zip(truth.images, truth.least_images, strict=True)
    ]
    texts = [
        _count(table, query, least, NEAREST, probes) / NEAREST
        for query, least in zip(truth.texts, truth.least_texts, strict=True)
    ]
    return float(np.mean(images)), float(np.mean(texts)) if texts else 1.0


def choose_probes(table: IndexTable, truth: Truth, partitions: int) -> int:
    """Return the number of partitions that searches must look into: the least that finds `AIM` of the nearest images.

    It is doubled until that is so. All partitions together find nearly all.
    """
    probes = FEWEST_PROBES
    while probes < partitions and min(measure_recall(table, truth, probes)) < AIM:
        probes *= 2
    return min(probes, partitions)


def _count(table: IndexTable, query: Floats, least: np.float32, count: int, probes: int) -> int:
    cosines = table.find(query, count, probes).embeddings @ query
    return int((cosines >= least - _EQUAL).sum())
