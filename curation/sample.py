"""Which images a person should look at: stratified by label and score, each with the weight that makes up for it.

A sample that is full of borderline images says nothing of the whole output by itself: of images near the threshold half
may be wrong, and of all images one in a hundred. Each row's weight is how many images of its stratum it stands for
(Horvitz and Thompson 1952), and everything that reads answers counts with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curation.histogram import bin_scores, rank_within
from curation.tagged_output import ID, TaggedOutput
from siglip.scoring import Floats
from storage.settings import ConfigError

EDGES = np.arange(-12.0, 7.0)
"""Logits of the score between strata: 20 a label, of a width of 1. Fixed, so that one pass does."""
STRATA = len(EDGES) + 1
USUAL = 0.1
"""Where a threshold is looked for when the label has none: SigLIP gives right labels 0.1 to 0.5."""
_LEAST = 2
_PENDING = 2_000_000
FILES = ("sample.parquet", "sample.json")


@dataclass(frozen=True)
class Sample:
    """N images to look at, each for one label. `weight` is the population of its stratum by those drawn of it.

    `place` is the image's number in the output's order, `label` an index of its set, `population` (L, strata) is how
    many images each stratum has.
    """

    place: NDArray[np.int64]
    label: NDArray[np.int64]
    score: Floats
    stratum: NDArray[np.int64]
    weight: NDArray[np.float64]
    population: NDArray[np.int64]


def draw_sample(output: TaggedOutput, per_label: int, seed: int = 0) -> Sample:
    """Draw about `per_label` images for each label, in one pass over the embeddings and with flat memory.

    Every stratum that has images gives two at least, or all it has, so that no image has no chance; the rest go where
    the threshold will be (`allocate`). The same seed draws the same sample from the same output. Images are drawn for
    each label by itself: one may be drawn for several.
    """
    labels = len(output.labels.names)
    reservoirs = _Reservoirs(labels, max(per_label, _LEAST))
    random = np.random.default_rng(seed)
    first = 0
    for scores in output.scores():
        reservoirs.add(first, scores, random.integers(0, 2**32, scores.shape, np.uint32))
        first += len(scores)
    thresholds = output.labels.thresholds()
    drawn = [allocate(*one, per_label) for one in zip(reservoirs.population, thresholds, strict=True)]
    return reservoirs.finish(np.stack(drawn))


def allocate(population: NDArray[np.int64], threshold: float, count: int) -> NDArray[np.int64]:
    """How many of each of a label's strata are drawn, together `count`, or a little more where strata are many.

    Two of each at first. The rest half by Neyman's rule (1934), population times the deviation of an answer, and half
    by the deviation alone, so that high scores, which few images have, are not left out. The deviation is sqrt(p(1-p))
    with p going through 1/2 at the label's threshold, and above it not less than a third: nobody knows yet how right
    its scores are, and a precision is shown by accepted answers.
    """
    given = np.minimum(population, _LEAST)
    middle = np.concatenate([[EDGES[0] - 1], (EDGES[:-1] + EDGES[1:]) / 2, [EDGES[-1] + 1]])
    above = middle - _logit(threshold if 0 < threshold < 1 else USUAL)
    chance = 1 / (1 + np.exp(-above))
    deviation = np.maximum(np.sqrt(chance * (1 - chance)), np.where(above > 0, 1 / 3, 0)) * (population > 0)
    while (left := count - int(given.sum())) > 0 and (given < population).any():
        room = population - given
        open_ = room > 0
        neyman = population * deviation * open_
        wanted = neyman / max(neyman.sum(), 1e-300) + deviation * open_ / max((deviation * open_).sum(), 1e-300)
        more = np.minimum(room, np.floor(left * wanted / wanted.sum()).astype(np.int64))
        if not more.any():
            more[np.argmax(wanted * open_)] = 1
        given = given + more
    return np.asarray(given, np.int64)


def check_folder(folder: Path) -> None:
    """Raises `ConfigError` when there is something in the folder that a sample is to go to."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: answers may be in it; give a new folder")


def write_sample(output: TaggedOutput, sample: Sample, folder: Path, seed: int) -> pa.Table:
    """`sample.parquet` and `sample.json` in a new folder. Returns the rows: one for each image and label.

    `thumbnail` is null where the output has none. Raises `ConfigError` when there is something in the folder.
    """
    check_folder(folder)
    kept = [name for name in ("key", "source", "sha256", "thumbnail") if name in output.columns]
    distinct, where = np.unique(sample.place, return_inverse=True)
    rows = output.take(distinct, [ID, *kept]).take(pa.array(where))
    thumbnails = rows["thumbnail"] if "thumbnail" in kept else pa.nulls(len(where), pa.binary())
    table = pa.table(
        {
            **{name: rows[name] for name in (ID, "key", "source", "sha256")},
            "label": pa.array(output.labels.label_names(), pa.string()).take(pa.array(sample.label)),
            "score": pa.array(sample.score),
            "stratum": pa.array(sample.stratum),
            "weight": pa.array(sample.weight),
            "thumbnail": thumbnails,
        }
    )
    about = {
        "output": output.uri,
        "images": output.rows,
        "labels.digest": output.fingerprint["labels.digest"],
        "seed": seed,
        "rows": table.num_rows,
        "stratum edges, logits": EDGES.tolist(),
        "population": dict(zip(output.labels.label_names(), sample.population.tolist(), strict=True)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / FILES[0], compression="zstd", use_dictionary=["source", "label"])
        (folder / FILES[1]).write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
    return table


def read_sample(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """What `write_sample` wrote. Raises `ConfigError` where there is none."""
    try:
        return pq.read_table(folder / FILES[0]), json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"{folder} holds no sample of `sightline sample`: {error}") from error


class _Reservoirs:
    """For each stratum the images with the smallest of random numbers: a simple random sample of what came so far."""

    def __init__(self, labels: int, capacity: int) -> None:
        self.population = np.zeros((labels, STRATA), np.int64)
        self._capacity = capacity
        self._first = np.arange(labels) * STRATA
        self._bars = np.full(labels * STRATA, np.iinfo(np.uint32).max, np.uint32)
        self._kept: list[tuple[NDArray[Any], ...]] = []
        self._count = 0

    def add(self, first: int, scores: Floats, numbers: NDArray[np.uint32]) -> None:
        """Images (N, L) from number `first` on."""
        bins, counts = bin_scores(scores, EDGES)
        strata = self._first + bins
        self.population += counts
        rows, labels = np.nonzero(numbers <= self._bars[strata])
        kept = (strata[rows, labels], numbers[rows, labels], first + rows, scores[rows, labels])
        self._kept.append(kept)
        self._count += len(rows)
        if self._count > _PENDING:
            self._prune()

    def finish(self, drawn: NDArray[np.int64]) -> Sample:
        """`drawn` (L, strata) of each stratum, label by label, in the order of chance."""
        self._prune()
        strata, numbers, places, scores = self._kept[0]
        chosen = rank_within(strata) < drawn.reshape(-1)[strata]
        strata, numbers, places, scores = (column[chosen] for column in (strata, numbers, places, scores))
        weight = (self.population.reshape(-1) / np.maximum(drawn.reshape(-1), 1))[strata]
        order = np.lexsort((numbers, strata // STRATA))
        label, stratum = np.divmod(strata[order], STRATA)
        return Sample(
            places[order], label, np.asarray(scores[order], np.float32), stratum, weight[order], self.population
        )

    def _prune(self) -> None:
        """Keep `capacity` images of each stratum, and remember the number that a new one must stay under."""
        columns: list[NDArray[Any]] = [np.concatenate(parts) for parts in zip(*self._kept, strict=True)]
        order = np.lexsort((columns[1], columns[0]))
        columns = [column[order] for column in columns]
        rank = rank_within(columns[0])
        last = rank == self._capacity - 1
        self._bars[columns[0][last]] = columns[1][last]
        kept = tuple(column[rank < self._capacity] for column in columns)
        self._kept, self._count = [kept], len(kept[0])


def _logit(score: float) -> float:
    return float(np.log(score / (1 - score)))
