"""Planted wrong answers that suspects find among the first 50 and 200, beside other rankings and cleanlab's.

    pip install cleanlab
    python -m benchmarks.suspects

Two truths, each with 4 % of its answers turned round. `synthetic`: eight labels that are right for 0.05 % to 20 % of
100,000 images, and 800 answers about each, more of them about high scores; prompts that know a label's direction only
about. `rendered`: 600 drawings, blurred and noisy, embedded by the shipped checkpoint, with answers about all eight
shapes. Figures are means over three seeds.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from benchmarks.outputs import SCALE, SyntheticOutput, write_output
from curation.estimates.confidence import Doubles
from curation.quality.suspects import measure_contradictions
from curation.quality.truth import Truth, group_answers
from curation.tagged_output import TaggedOutput, open_output
from sightline.demo.shapes import LABELS, SHAPES, render
from siglip.checkpoint import pin_model
from siglip.config import ModelConfig
from siglip.encoder import Encoder
from siglip.labels import LabelSet
from siglip.scoring import Floats

WRONG, SEEDS = 0.04, 3
IMAGES, ANSWERS, WIDTH, DRAWINGS = 100_000, 800, 64, 600
PREVALENCES = np.geomspace(0.0005, 0.2, 8)
FIRST = (50, 200)

Made = tuple[TaggedOutput, Truth]


def make_synthetic(seed: int, folder: str) -> Made:
    """Make the synthetic output of the answered images, and its truth, without wrong answers."""
    rng = np.random.default_rng(seed)
    spread = np.arange(1, WIDTH + 1) ** -0.5
    axes = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    directions = _normalise(rng.standard_normal((8, 40)) @ axes[:, :40].T)
    right = rng.random((IMAGES, 8)) < PREVALENCES
    images = (rng.standard_normal((IMAGES, WIDTH)) * spread / np.linalg.norm(spread)) @ axes.T
    images = _normalise(images + 0.6 * right @ directions + 0.8 * axes[:, 0])
    texts = _normalise(directions + 0.8 * _normalise(rng.standard_normal((8, WIDTH))))
    cells = []
    for label in range(8):
        order = np.argsort(-(images @ texts[label]))
        high = order[: max(2 * int(right[:, label].sum()), ANSWERS)][: IMAGES // 3]
        drawn = [rng.choice(high, ANSWERS * 3 // 5, replace=False), rng.choice(order[len(high) :], ANSWERS * 2 // 5)]
        cells += [(image, label) for image in np.unique(np.concatenate(drawn))]
    image, label = np.asarray(cells).T
    answered, position = np.unique(image, return_inverse=True)
    names = LabelSet.model_validate({"names": [f"label {row}" for row in range(8)]})
    kept = images[answered].astype(np.float32)
    write_output(folder, SyntheticOutput(names, texts.astype(np.float32), 1, lambda shard: kept, scale=SCALE))
    return open_output(folder), _make_truth(kept, position, label, right[image, label])


def make_rendered(seed: int, folder: str) -> Made:
    """Make the output of the drawings, and its truth, without wrong answers."""
    drawn, rng = random.Random(seed), np.random.default_rng(seed)
    encoder = Encoder(pin_model(ModelConfig(source="tiny", dtype="float32", compile=False)))
    shown = [drawn.choice(LABELS) for _ in range(DRAWINGS)]
    pixels = []
    for label in shown:
        drawing: Image.Image = render(label, drawn).filter(ImageFilter.GaussianBlur(drawn.uniform(0, 5)))
        levels = 128 + (np.asarray(drawing, np.float64) - 128) * drawn.uniform(0.3, 1)
        pixels.append(np.clip(levels + rng.normal(0, drawn.uniform(0, 30), levels.shape), 0, 255).astype(np.uint8))
    embeddings = encoder.embed_images(np.stack(pixels))
    labels = LabelSet.model_validate({"names": list(SHAPES)})
    texts = encoder.embed_labels(labels)
    write_output(folder, SyntheticOutput(labels, texts, 1, lambda shard: embeddings, scale=encoder.scale))
    right = np.asarray([[name.split()[1] == shape for shape in SHAPES] for name in shown])
    image, label_index = (axis.reshape(-1) for axis in np.indices(right.shape))
    return open_output(folder), _make_truth(embeddings, image, label_index, right.reshape(-1))


def rank_by_distance(output: TaggedOutput, truth: Truth) -> Doubles:
    """The distance of an answer's logit from the mean logit of the opposite answers, in their standard deviations."""

    def rank(embeddings: Doubles, logits: Doubles, right: NDArray[np.bool_]) -> Doubles:
        found = np.empty(len(right))
        for answer in (True, False):
            opposite = logits[right != answer]
            distance = (logits[right == answer] - opposite.mean()) / opposite.std(ddof=1)
            found[right == answer] = -distance if answer else distance
        return found

    return _rank_labels(output, truth, rank)


def rank_by_neighbours(output: TaggedOutput, truth: Truth) -> Doubles:
    """The share of an image's 10 nearest answered images that have the opposite answer."""

    def rank(embeddings: Doubles, logits: Doubles, right: NDArray[np.bool_]) -> Doubles:
        cosines = embeddings @ embeddings.T
        np.fill_diagonal(cosines, -2)
        nearest = np.argsort(-cosines, axis=1)[:, :10]
        return np.asarray((right[nearest] != right[:, None]).mean(axis=1), np.float64)

    return _rank_labels(output, truth, rank)


def rank_by_calibration(output: TaggedOutput, truth: Truth) -> Doubles:
    """The probability of the opposite answer by the label's logit alone: cross-validated Platt scaling."""
    return _rank_labels(output, truth, lambda _, logits, right: _oppose(_predict(logits[:, None], right), right))


def rank_by_cleanlab(method: str, inputs: str) -> Callable[[TaggedOutput, Truth], Doubles]:
    """cleanlab's ranking of each label's answers as a problem with two classes.

    `method` is `find_label_issues`, its list of issues before all others, or a quality score. `inputs` are the inputs
    of its probabilities: `logit`, `embedding` (its default regression) or `both`, those of `find_suspects`.
    """

    def rank_all(output: TaggedOutput, truth: Truth) -> Doubles:
        margins = measure_contradictions(output, truth, 0)
        both = 1 / (1 + np.exp(np.where(truth.right, margins, -margins)))

        def rank(embeddings: Doubles, logits: Doubles, right: NDArray[np.bool_], both: Doubles) -> Doubles:
            from cleanlab.filter import find_label_issues
            from cleanlab.rank import get_label_quality_scores

            probability = (
                both if inputs == "both" else _predict(logits[:, None] if inputs == "logit" else embeddings, right)
            )
            table, given = np.column_stack([1 - probability, probability]), right.astype(int)
            if method == "find_label_issues":
                found = np.asarray(find_label_issues(given, table, n_jobs=1), np.float64)
                return np.asarray(found - get_label_quality_scores(given, table), np.float64)
            adjusted = method == "adjusted normalized margin"
            name = "normalized_margin" if adjusted else "self_confidence"
            quality = get_label_quality_scores(given, table, method=name, adjust_pred_probs=adjusted)
            return np.asarray(-quality, np.float64)

        return _rank_labels(output, truth, rank, both)

    return rank_all


RANKINGS: dict[str, Callable[[TaggedOutput, Truth], Doubles]] = {
    "find_suspects": lambda output, truth: measure_contradictions(output, truth, 0),
    "distance from the opposite answers' mean logit": rank_by_distance,
    "nearest neighbours": rank_by_neighbours,
    "calibrated logit": rank_by_calibration,
    "cleanlab find_label_issues, calibrated logit": rank_by_cleanlab("find_label_issues", "logit"),
    "cleanlab find_label_issues, embedding": rank_by_cleanlab("find_label_issues", "embedding"),
    "cleanlab find_label_issues, find_suspects' probabilities": rank_by_cleanlab("find_label_issues", "both"),
    "cleanlab self-confidence, find_suspects' probabilities": rank_by_cleanlab("self-confidence", "both"),
    "cleanlab adjusted margin, find_suspects' probabilities": rank_by_cleanlab("adjusted normalized margin", "both"),
}


def plant(truth: Truth, seed: int) -> tuple[Truth, NDArray[np.bool_]]:
    """Turn a share `WRONG` of the answers round. Returns the truth and which answers are wrong (A,)."""
    wrong = np.random.default_rng(seed).random(len(truth.right)) < WRONG
    return replace(truth, right=truth.right ^ wrong), wrong


def _rank_labels(output: TaggedOutput, truth: Truth, rank: Callable[..., Doubles], *columns: Doubles) -> Doubles:
    logits = truth.logits(output).astype(np.float64)
    found = np.empty(len(logits))
    for answers in group_answers(truth, len(output.labels.names)):
        embeddings = truth.embeddings[truth.image[answers]].astype(np.float64)
        more = (column[answers] for column in columns)
        found[answers] = rank(embeddings, logits[answers], truth.right[answers], *more)
    return found


def _predict(inputs: Doubles, right: NDArray[np.bool_]) -> Doubles:
    model = LogisticRegression(max_iter=1000)
    return np.asarray(cross_val_predict(model, inputs, right, method="predict_proba")[:, 1], np.float64)


def _oppose(probability: Doubles, right: NDArray[np.bool_]) -> Doubles:
    return np.where(right, 1 - probability, probability)


def _make_truth(
    embeddings: Floats, image: NDArray[np.int64], label: NDArray[np.int64], right: NDArray[np.bool_]
) -> Truth:
    names = [str(row) for row in range(len(embeddings))]
    return Truth(np.arange(len(names)), names, names, embeddings, image, label, right, np.ones(len(right)))


def _normalise(vectors: Doubles) -> Doubles:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float64)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if find_spec("cleanlab") is None:
        print("cleanlab is not installed: its rankings are left out")
        RANKINGS = {name: rank for name, rank in RANKINGS.items() if not name.startswith("cleanlab")}
    for title, make in (("synthetic", make_synthetic), ("rendered", make_rendered)):
        totals, planted = {name: np.zeros(len(FIRST)) for name in RANKINGS}, 0
        for seed in range(SEEDS):
            with tempfile.TemporaryDirectory() as folder:
                output, truth = make(seed, f"{folder}/made")
                truth, wrong = plant(truth, seed)
                planted += int(wrong.sum())
                for name, rank in RANKINGS.items():
                    order = np.argsort(-rank(output, truth), kind="stable")
                    totals[name] += [wrong[order[:first]].sum() for first in FIRST]
        print(f"{title}: {planted / SEEDS:.0f} wrong answers\n{'':58s} first 50  first 200")
        for name, (fifty, hundreds) in totals.items():
            print(f"  {name:56s} {fifty / SEEDS:8.1f}  {hundreds / SEEDS:9.1f}", flush=True)
